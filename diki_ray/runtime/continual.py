"""The main job: what is in the configuration and not yet in the store is trained, then the stream is evaluated.

Data flows one way: configuration -> stream -> trainer -> store -> router -> evaluator -> report.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from diki_ray.config import Config
from diki_ray.model.module import TaskModule
from diki_ray.runtime.cluster import cluster
from diki_ray.runtime.evaluator import evaluate
from diki_ray.runtime.plan import Plan, load_backbone, make_plan
from diki_ray.runtime.progress import Display, following
from diki_ray.runtime.results import DOCUMENT, build_results, protocol_id, table
from diki_ray.runtime.store_actor import StoreClient
from diki_ray.runtime.trainer import train


def run_continual(config: Config, console: Console) -> dict[str, Any]:
    """Learns the stream and returns its results, which are also in the run's storage; running it again trains nothing
    that is committed.

    Raises:
        UserError: what the user can put right; what was committed before stays.
    """
    clock = _Clock()
    plan = make_plan(config, load_backbone(config))
    clock.lap("plan")
    with cluster(config), _store(config) as store:
        clock.lap("cluster")
        display = Display(console)
        display.say(
            f"run {config.run.name!r} on {store.handle.storage}: {len(plan.tasks)} tasks, {protocol_id(config)}"
        )
        trained = _learn(plan, store, display)
        clock.lap("train")
        results = None if trained else _unchanged_results(plan, store)
        if results is None:
            results = _evaluated(plan, store, display, clock, trained)
        else:
            display.say("nothing to train or evaluate: results of the same configuration and modules are there.")
        console.print(table(results))
        return results


def _learn(plan: Plan, store: StoreClient, display: Display) -> list[str]:
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
    if pending:
        workers = plan.config.train.num_workers
        display.say(f"training {len(pending)} tasks with {workers} worker{'s' if workers > 1 else ''} …")
        display.expect([task.name for task in pending])
        with display.bars, following(store, [display]):
            train(plan.config, pending, store)
    return [task.name for task in pending]


def _evaluated(plan: Plan, store: StoreClient, display: Display, clock: _Clock, trained: list[str]) -> dict[str, Any]:
    display.say("evaluating …")
    with display.bars:
        evaluation, notes = evaluate(
            plan, store, lambda done, total: display.on_event({"kind": "evaluated", "done": done, "total": total})
        )
    clock.lap("evaluate")
    entries = {entry.key: entry for entry in store.modules()}
    digests = [entries[task.key].digest for task in plan.tasks]
    results = build_results(
        plan,
        [TaskModule.from_bytes(store.read_module(digest)) for digest in digests],
        digests,
        evaluation,
        notes=notes,
        seconds=clock.laps,
        trained=trained,
        command=shlex.join(["python", *sys.argv]),
    )
    store.put_document("config.yaml", plan.config.to_yaml())
    store.put_document(DOCUMENT, results)
    return results


def _unchanged_results(plan: Plan, store: StoreClient) -> dict[str, Any] | None:
    """The stored results, if they are of this configuration and of the modules that are in the run now."""
    results = store.get_document(DOCUMENT)
    if results is None or results["config_digest"] != plan.config.digest():
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
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._started = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self._started
        self._started = now
