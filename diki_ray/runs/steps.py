"""The steps of a run that its driver takes, wherever its workers are: what is in the configuration and not yet in the
store is trained, then the stream is evaluated. Nothing here imports Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from diki_ray.answering.evaluation import Evaluation
from diki_ray.config import Config
from diki_ray.config.yaml_text import read_tree
from diki_ray.data.completeness import shortcomings
from diki_ray.errors import CorruptError
from diki_ray.learning.module import TaskModule
from diki_ray.report.results import DOCUMENT
from diki_ray.report.results_schema import check_results
from diki_ray.report.run import REPORT, render
from diki_ray.runs import changed_data
from diki_ray.runs.evaluate.split import digests_of
from diki_ray.runs.plan import Plan, PlannedTask
from diki_ray.runs.progress import Display, Listener, OnProgress, following
from diki_ray.runs.results import build_results, is_of_configuration
from diki_ray.runs.verification import PARTS, check_parts
from diki_ray.store.interface import HeldRun, ReadableRun
from diki_ray.store.run_store import CONFIG_DOCUMENT, RunStore


@dataclass(frozen=True)
class Workplace:
    """Where a run's workers are: in this process (`runs/in_process.py`), or on Ray (`runs/on_ray.py`)."""

    held: Callable[[Config], AbstractContextManager[HeldRun]]
    """Holds the run of a configuration for a block."""
    train: Callable[[Config, Sequence[PlannedTask], HeldRun], None]
    """Trains tasks and commits each module."""
    evaluate: Callable[[Plan, HeldRun, OnProgress], Evaluation]
    """Evaluates the test sets of a plan whose modules are committed, along its stream."""
    workers: Callable[[Config], str]
    """Says of a configuration who trains, as in `with 2 workers`."""


def with_parts_of_the_run(config: Config) -> Config:
    """The configuration with `train.num_parts` said: as it was, or else what the run was begun with, so that another
    number of workers trains nothing anew. Runs from before there were parts had one for each worker."""
    if config.train.num_parts is not None:
        return config
    run = RunStore.open(config.run.storage, config.run.name)
    begun, evaluated = run.get_document(PARTS), run.get_document(CONFIG_DOCUMENT)
    parts = config.train.num_workers
    if begun is not None:
        parts = check_parts(begun, PARTS)
    elif evaluated is not None:
        train = read_tree(evaluated, CONFIG_DOCUMENT).get("train")  # of a version whose fields may be others
        parts = check_parts(
            {"num_parts": train.get("num_workers") if isinstance(train, dict) else None}, CONFIG_DOCUMENT
        )
    return config.model_copy(update={"train": config.train.model_copy(update={"num_parts": parts})})


def learn(plan: Plan, store: HeldRun, place: Workplace, display: Display, listeners: Sequence[Listener]) -> list[str]:
    """Makes every task's module part of the run; the names of those that had to be trained."""
    for task in plan.tasks:
        if lacking := shortcomings(task.index):
            display.say(f"{task.name} is not complete: {'; '.join(lacking)}")
    if sentence := plan.few_images():
        display.say(sentence)
    if store.get_document(PARTS) != (parts := {"num_parts": plan.config.train.parts}):
        store.put_document(PARTS, parts)
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
        elif changed := changed_data.sentence(task):
            display.say(f"{task.name}: {changed}")
    if pending:
        display.say(f"training {len(pending)} task{'s' if len(pending) > 1 else ''} {place.workers(plan.config)} …")
        display.expect([task.name for task in pending])
        with display.bars, following(store, listeners):
            place.train(plan.config, pending, store)
    return [task.name for task in pending]


def evaluate(
    plan: Plan,
    store: HeldRun,
    place: Workplace,
    display: Display,
    listeners: Sequence[Listener],
    *,
    seconds: Callable[[], dict[str, float]],
    trained: Sequence[str],
    command: str,
) -> dict[str, Any]:
    """Evaluates the stream; stores its results, their configuration and report, and returns the results.

    seconds: of each phase so far; trained: the tasks that had to be trained; command: what was typed.
    """

    def on_progress(what: str, done: int, total: int) -> None:
        for listener in listeners:
            listener.on_event({"kind": "evaluated", "what": what, "done": done, "total": total})

    display.say("evaluating …")
    with display.bars:
        evaluation = place.evaluate(plan, store, on_progress)
    display.say("computing the accuracy matrix, then results and report …")
    digests = digests_of(plan, store)
    results = build_results(
        plan,
        [TaskModule.from_bytes(store.read_module(digest)) for digest in digests],
        digests,
        evaluation,
        notes={"text_feature_error": evaluation.text_feature_error, "text_grid": plan.config.evaluate.text_grid},
        seconds=seconds(),
        trained=trained,
        command=command,
    )
    store.put_document(CONFIG_DOCUMENT, plan.config.to_yaml())
    store.put_document(DOCUMENT, results)
    store.put_document(REPORT, render([results]))
    return results


def unchanged_results(plan: Plan, store: ReadableRun) -> dict[str, Any] | None:
    """The stored results, if they are of this configuration and of the modules that are in the run now."""
    try:
        results = store.get_document(DOCUMENT)
        if results is None or not is_of_configuration(check_results(results, DOCUMENT), plan.config):
            return None
    except CorruptError:
        return None  # they are made again
    same = [t["module"] for t in results["tasks"]]
    data = [task.index.digest() for task in plan.tasks]
    if [m["digest"] for m in same] != digests_of(plan, store) or [
        t["data"]["digest"] for t in results["tasks"]
    ] != data:
        return None
    return results
