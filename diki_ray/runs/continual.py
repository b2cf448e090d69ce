"""The main job: what is in the configuration and not yet in the store is trained, then the stream is evaluated.

Data flows one way: configuration -> stream -> trainer -> store -> router -> evaluator -> report.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console

from diki_ray.config import Config
from diki_ray.config.run import TaskSection
from diki_ray.data.index import DatasetIndex
from diki_ray.data.prepare import Preparation
from diki_ray.report.next_steps import next_steps, typed_again
from diki_ray.report.results import table
from diki_ray.report.run import REPORT, render
from diki_ray.runs import steps
from diki_ray.runs.changed_data import with_former_modules
from diki_ray.runs.on_ray import ON_RAY
from diki_ray.runs.plan import find_data, load_backbone, make_plan
from diki_ray.runs.progress import Display
from diki_ray.runs.results import protocol_id, protocol_of
from diki_ray.runs.telemetry import Telemetry, exporting
from diki_ray.runs.tracking import Tracking, tracking


def run_continual(config: Config, console: Console, config_file: str | None = None) -> dict[str, Any]:
    """Learns the stream and returns its results, which are also in the run's storage; running it again trains nothing
    that is committed.

    config_file: where the configuration came from, for what is said at the end.

    Raises:
        UserError: what the user can put right; what was committed before stays.
    """
    display, protocol = Display(console), protocol_id(config)
    with exporting(config, protocol) as telemetry, tracking(config, protocol, display.say) as tracked:
        results = _run(config, display, telemetry, tracked)
        console.print(table(results))
        console.print(
            next_steps(config, typed_again(sys.argv), config_file), highlight=False, markup=False, soft_wrap=True
        )
    return results


def _run(config: Config, display: Display, telemetry: Telemetry, tracked: Tracking) -> dict[str, Any]:
    clock = _Clock(telemetry)
    clock.start("plan")
    config = steps.with_parts_of_the_run(config)
    data = find_data(config)  # before weights are fetched, which can take minutes
    plan = make_plan(config, load_backbone(config), data)
    clock.start("cluster")
    with ON_RAY.held(config) as store:
        plan = with_former_modules(plan, store)
        telemetry.watch(store, [task.key for task in plan.tasks])
        display.say(f"run {config.run.name!r} on {store.storage}: {len(plan.tasks)} tasks, {protocol_of(plan)}")
        for task, (section, found) in zip(plan.tasks, data, strict=True):
            if _named_shortly(section, found):
                display.say(f"{task.name}: {section.data} is {task.index.uri}")
        clock.start("train")
        trained = steps.learn(plan, store, ON_RAY, display, [display, telemetry, tracked])
        results = None if trained else steps.unchanged_results(plan, store)
        if results is None:
            clock.start("evaluate")
            results = steps.evaluate(
                plan,
                store,
                ON_RAY,
                display,
                [display, telemetry],
                seconds=clock.laps,
                trained=trained,
                command=typed_again(sys.argv),
            )
        else:
            display.say("nothing to train or evaluate: results of the same configuration and modules are there.")
            if store.get_document(REPORT) is None:  # the driver ended between the results and their report
                store.put_document(REPORT, render([results]))
        telemetry.on_results(results)
        tracked.on_results(results)
        return results


def _named_shortly(section: TaskSection, found: DatasetIndex | Preparation) -> bool:
    """Whether a task's data are written without the digest of the prepared data set that they are."""
    if not isinstance(found, DatasetIndex):
        return False
    return section.data.rstrip("/").rpartition("/")[2] == found.uri.rpartition("/")[2].rpartition("-")[0]


class _Clock:
    """Seconds of each phase; telemetry says which one goes on."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._started: list[tuple[str, float]] = []

    def start(self, phase: str) -> None:
        self._started.append((phase, time.monotonic()))
        self._telemetry.phase.state(phase)

    def laps(self) -> dict[str, float]:
        """Seconds of the phases so far, the one that goes on included."""
        ends = [started for _, started in self._started[1:]] + [time.monotonic()]
        return {phase: end - started for (phase, started), end in zip(self._started, ends, strict=True)}
