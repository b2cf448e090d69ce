"""The main job: what is in the configuration and not yet in the store is trained, then the stream is evaluated.

Data flows one way: configuration -> stream -> trainer -> store -> router -> evaluator -> report.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from rich.console import Console

from diki_ray.config import Config
from diki_ray.config.run import TaskSection
from diki_ray.data.completeness import shortcomings
from diki_ray.data.index import DatasetIndex
from diki_ray.data.prepare import Preparation
from diki_ray.learning.module import TaskModule
from diki_ray.report.next_steps import next_steps, typed_again
from diki_ray.report.results import DOCUMENT, table
from diki_ray.report.run import REPORT, render
from diki_ray.runs.changed_data import sentence, with_former_modules
from diki_ray.runs.evaluate.split import evaluate_run
from diki_ray.runs.plan import Plan, find_data, load_backbone, make_plan
from diki_ray.runs.progress import Display, Listener, following
from diki_ray.runs.results import build_results, is_of_configuration, protocol_id, protocol_of
from diki_ray.runs.run_cluster import cluster
from diki_ray.runs.store_client import StoreClient
from diki_ray.runs.telemetry import Telemetry, exporting
from diki_ray.runs.tracking import Tracking, tracking
from diki_ray.runs.train.group import train
from diki_ray.store.interface import HeldRun, ReadableRun
from diki_ray.store.run_store import CONFIG_DOCUMENT, RunStore

PARTS = "parts.json"
"""The document that says in how many parts the steps of the run are computed, written before anything is trained."""


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
    config = with_parts_of_the_run(config)
    data = find_data(config)  # before weights are fetched, which can take minutes
    plan = make_plan(config, load_backbone(config), data)
    clock.start("cluster")
    with cluster(config), _store(config) as store:
        plan = with_former_modules(plan, store)
        telemetry.watch(store, [task.key for task in plan.tasks])
        display.say(f"run {config.run.name!r} on {store.storage}: {len(plan.tasks)} tasks, {protocol_of(plan)}")
        for task, (section, found) in zip(plan.tasks, data, strict=True):
            if _named_shortly(section, found):
                display.say(f"{task.name}: {section.data} is {task.index.uri}")
            if lacking := shortcomings(task.index):
                display.say(f"{task.name} is not complete: {'; '.join(lacking)}")
        if sentence := plan.few_images():
            display.say(sentence)
        if store.get_document(PARTS) != (parts := {"num_parts": config.train.parts}):
            store.put_document(PARTS, parts)
        clock.start("train")
        trained = _learn(plan, store, display, [display, telemetry, tracked])
        results = None if trained else unchanged_results(plan, store)
        if results is None:
            clock.start("evaluate")
            results = _evaluated(plan, store, display, telemetry, clock, trained)
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


def with_parts_of_the_run(config: Config) -> Config:
    """The configuration with `train.num_parts` said: as it was, or else what the run was begun with, so that another
    number of workers trains nothing anew. Runs from before there were parts had one for each worker."""
    if config.train.num_parts is not None:
        return config
    run = RunStore.open(config.run.storage, config.run.name)
    begun, evaluated = run.get_document(PARTS), run.get_document(CONFIG_DOCUMENT)
    parts = config.train.num_workers
    if begun is not None:
        parts = begun["num_parts"]
    elif evaluated is not None:
        parts = yaml.safe_load(evaluated)["train"]["num_workers"]
    return config.model_copy(update={"train": config.train.model_copy(update={"num_parts": parts})})


def _learn(plan: Plan, store: HeldRun, display: Display, listeners: Sequence[Listener]) -> list[str]:
    """Makes every task's module part of the run; the names of those that had to be trained."""
    damaged = {entry.key for entry in store.damaged_modules()}
    committed = {entry.key: entry for entry in store.modules() if entry.key not in damaged}
    for key in damaged:
        display.say(f"the stored module {key[:12]} is damaged: its task is trained again")
    for task in plan.pending(committed):
        if task.key not in damaged and (entry := store.adopt_module(task.key, task.name)) is not None:
            committed[task.key] = entry
            display.say(f"{task.name}: its module is in this storage already, from another run; taken as it is")
    pending = plan.pending(committed)
    for task in plan.tasks:
        if task.key in committed:
            display.say(f"{task.name}: learnt already")
        elif changed := sentence(task):
            display.say(f"{task.name}: {changed}")
    if pending:
        least, most = plan.config.train.min_workers, plan.config.train.most_workers
        workers = f"{'' if least is None else f'{least} to '}{most} worker{'s' if most > 1 else ''}"
        if (asked := plan.config.train.num_workers) > most:
            workers += f" of {asked} (the steps of this run have {most} part{'s' if most > 1 else ''}, train.num_parts)"
        display.say(f"training {len(pending)} tasks with {workers} …")
        display.expect([task.name for task in pending])
        with display.bars, following(store, listeners):
            train(plan.config, pending, store)
    return [task.name for task in pending]


def _evaluated(
    plan: Plan, store: HeldRun, display: Display, telemetry: Telemetry, clock: _Clock, trained: list[str]
) -> dict[str, Any]:
    def on_progress(done: int, total: int) -> None:
        for listener in (display, telemetry):
            listener.on_event({"kind": "evaluated", "done": done, "total": total})

    display.say("evaluating …")
    with display.bars:
        evaluation = evaluate_run(plan, store, on_progress)
    display.say("writing results and report …")
    entries = {entry.key: entry for entry in store.modules()}
    digests = [entries[task.key].digest for task in plan.tasks]
    results = build_results(
        plan,
        [TaskModule.from_bytes(store.read_module(digest)) for digest in digests],
        digests,
        evaluation,
        notes={"text_feature_error": evaluation.text_feature_error, "text_grid": plan.config.evaluate.text_grid},
        seconds=clock.laps(),
        trained=trained,
        command=typed_again(sys.argv),
    )
    store.put_document(CONFIG_DOCUMENT, plan.config.to_yaml())
    store.put_document(DOCUMENT, results)
    store.put_document(REPORT, render([results]))
    return results


def unchanged_results(plan: Plan, store: ReadableRun) -> dict[str, Any] | None:
    """The stored results, if they are of this configuration and of the modules that are in the run now."""
    results = store.get_document(DOCUMENT)
    if results is None or not is_of_configuration(results, plan.config):
        return None
    digests = {entry.key: entry.digest for entry in store.modules()}
    same = [t["module"] for t in results["tasks"]]
    now = [digests[task.key] for task in plan.tasks]
    data = [task.index.digest() for task in plan.tasks]
    if [m["digest"] for m in same] != now or [t["data"]["digest"] for t in results["tasks"]] != data:
        return None
    return results


@contextmanager
def _store(config: Config) -> Iterator[StoreClient]:
    store = StoreClient.start(config.run.storage, config.run.name, take_over=config.run.take_over)
    try:
        yield store
    finally:
        store.stop()


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
