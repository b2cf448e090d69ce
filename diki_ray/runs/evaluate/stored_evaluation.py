"""Any stored run, evaluated under any routing, label space and order of its tasks, in this process: nothing is trained,
no cluster is started, and what earlier evaluations have computed of the same thing is taken from the storage's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from diki_ray.answering.answers import Prediction, block_tasks, candidate_tasks
from diki_ray.answering.evaluation import Evaluated, TestSet
from diki_ray.answering.routing import NO_TASK
from diki_ray.config import Config
from diki_ray.config.protocols import protocol
from diki_ray.errors import ConfigError, DataError
from diki_ray.learning.module import TaskModule
from diki_ray.runs.evaluate.evaluator import Cache, Evaluating, Part, num_batches_of
from diki_ray.runs.plan import Plan, PlannedTask, answered_along, is_sequential, load_backbone, make_plan
from diki_ray.runs.results import protocol_id
from diki_ray.runs.stored_run import check_backbone, config_of, open_learnt
from diki_ray.store import caches
from diki_ray.store.run_store import RunStore


@dataclass(frozen=True)
class Asked:
    """How to evaluate; None is as the run has it."""

    routing: str | None = None
    label_space: str | None = None
    order: tuple[str, ...] | None = None
    """Names of the tasks that are learnt, in this order; the run's others are test sets that are not learnt."""
    split: str = "test"
    cache: bool = True
    """False: neither read what the storage's cache has, nor add to it."""


def evaluate_stored(
    storage: str,
    run: str,
    asked: Asked,
    config: Config | None = None,
    on_progress: Callable[[str], None] = lambda task: None,
) -> Evaluated:
    """The answers of a stored run as they are asked for.

    config: the run's own by default. on_progress: called with each test set's name before it is answered.

    Raises:
        ConfigError: no such run or task, no configuration, another backbone. DataError: a test set that cannot be read.
    """
    store = open_learnt(storage, run)
    config = _configured(config_of(store, config), storage, run, asked)
    backbone = load_backbone(config)
    whole = make_plan(config, backbone)
    check_backbone(store, backbone.name, whole.backbone_digest)
    plan, digests, notes = _learnt(store, whole)
    order = _order([t.name for t in plan.tasks], asked.order, run)
    if is_sequential(config) and order != list(range(len(order))):
        raise ConfigError(
            f"--order: each module of run {run!r} was trained from the one before it ({config.method.name}), so "
            "another order is other modules; train it with the tasks in that order, or ask for the first tasks of "
            f"{', '.join(t.name for t in plan.tasks)}."
        )
    if answered_along(config):
        # These answers come along the plan's own order: so the plan is put into the order that is asked for.
        arranged = [*order, *(t for t in range(len(plan.tasks)) if t not in order)]
        plan = replace(plan, tasks=tuple(plan.tasks[t] for t in arranged))
        digests, order = [digests[t] for t in arranged], list(range(len(order)))
    parts = _answers(plan, digests, order, store, asked, on_progress)
    shown = [*order, *(t for t in range(len(plan.tasks)) if t not in order)]
    settings = {
        "protocol": _protocol(config, asked, len(order) == len(whole.tasks)),
        "routing": config.evaluate.routing,
        "label_space": config.evaluate.label_space,
        "split": asked.split,
        "order": [plan.tasks[t].name for t in order],
        "unlearnt": [plan.tasks[t].name for t in shown[len(order) :]],
        "calibration": config.calibration.form,
        "config_digest": config.digest(),
    }
    test_sets = tuple(_test_set(plan, order, j, parts[j], asked.split) for j in shown)
    return Evaluated(run, settings, test_sets, tuple(notes))


def _configured(config: Config, storage: str, run: str, asked: Asked) -> Config:
    evaluate: dict[str, Any] = {"routing": asked.routing, "label_space": asked.label_space}
    changed = {name: value for name, value in evaluate.items() if value is not None}
    cpu_only = config.train.device == "cuda" and not torch.cuda.is_available()
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"storage": storage, "name": run}),
            "evaluate": config.evaluate.model_copy(update=changed),
            "train": config.train.model_copy(update={"device": "cpu"}) if cpu_only else config.train,
        }
    )


def _protocol(config: Config, asked: Asked, whole: bool) -> str | None:
    """The full id that the numbers may be compared under; None where they are of something else."""
    name = config.protocol.partition("/")[0]
    if asked.split != "test" or not whole or asked.order is not None:
        return None
    if name != "own" and config.evaluate.label_space != protocol(name).label_space:
        return None
    return protocol_id(config)


def _learnt(store: RunStore, whole: Plan) -> tuple[Plan, list[str], list[str]]:
    """The plan's tasks that the run has modules for, the modules' digests, and what is to be said about the others.

    By key; else, for modules that were not trained from this configuration (imported ones), by the task's name.
    """
    by_key = {entry.key: entry for entry in store.modules()}
    by_name = {entry.task: entry for entry in store.modules()}
    tasks: list[PlannedTask] = []
    digests: list[str] = []
    notes: list[str] = []
    for task in whole.tasks:
        entry = by_key.get(task.key) or by_name.get(task.name)
        if entry is None:
            notes.append(f"{task.name}: the run has no module of it; left out")
            continue
        if entry.key != task.key:
            module = TaskModule.from_bytes(store.read_module(entry.digest))
            if module.class_names != task.class_names:
                raise ConfigError(
                    f"task {task.name!r}: the run's module has {len(module.class_names)} classes and the data set at "
                    f"{task.index.uri} has {len(task.class_names)}, or others: give the configuration it was learnt by."
                )
            notes.append(f"{task.name}: its module was not trained from this configuration and data")
        tasks.append(task)
        digests.append(entry.digest)
    if not tasks:
        raise ConfigError(
            f"run {store.run!r} has learnt {', '.join(by_name)}; the configuration has none of them, but "
            f"{', '.join(t.name for t in whole.tasks)}."
        )
    return replace(whole, tasks=tuple(tasks)), digests, notes


def _order(names: Sequence[str], asked: Sequence[str] | None, run: str) -> list[int]:
    if asked is None:
        return list(range(len(names)))
    unknown = [name for name in asked if name not in names]
    if unknown or len(set(asked)) < len(asked) or not asked:
        what = f"{unknown[0]!r} is none of them" if unknown else "each at most once, and at least one"
        raise ConfigError(f"--order names tasks of run {run!r} ({', '.join(names)}): {what}.")
    return [names.index(name) for name in asked]


def _answers(
    plan: Plan,
    digests: Sequence[str],
    order: Sequence[int],
    store: RunStore,
    asked: Asked,
    on_progress: Callable[[str], None],
) -> list[Part]:
    """The answers of every test set of the plan, in its order."""
    evaluating = Evaluating(plan.config, plan.tasks, digests, store.read_module, asked.split, [order])
    parts = []
    for j, task in enumerate(plan.tasks):
        on_progress(task.name)
        cache = Cache(plan, caches.Cache(store.objects), j, digests, asked.split) if asked.cache else None
        known = cache.load() if cache else None
        part = evaluating.evaluate(j, range(num_batches_of(plan.config, task, asked.split)), known)
        if not len(part.answers.labels):
            raise DataError(f"task {task.name!r}: its {asked.split} split has no readable image.")
        if cache:
            cache.save(part)
        parts.append(part)
    return parts


def _test_set(plan: Plan, order: Sequence[int], j: int, part: Part, split: str) -> TestSet:
    """Test set j with its answers after 0 … n tasks of the order."""
    names = [t.class_names for t in plan.tasks]
    labels, num_tasks, space = part.answers.labels, len(plan.tasks), plan.config.evaluate.label_space
    block_of = block_tasks(space, j, num_tasks)

    def after(learnt: Sequence[int]) -> Prediction:
        candidates = candidate_tasks(space, j, learnt, num_tasks)
        return part.answers.predict(learnt, candidates, [block_of.index(t) for t in candidates])

    computed = part.along[: len(order)]
    along = [after(()), *(computed or (after(order[:n]) for n in range(1, len(order) + 1)))]
    place = {NO_TASK: NO_TASK} | {task: n for n, task in enumerate(order)}
    return TestSet(
        name=plan.tasks[j].name,
        class_names=names[j],
        data=plan.tasks[j].index.digest(split),
        keys=part.keys,
        labels=labels,
        learnt_at=place.get(j),
        correct=np.stack([p.correct(labels, j, names) for p in along]),
        confidence=np.stack([p.confidence for p in along]),
        routed=np.stack([np.array([place[t] for t in p.routed.tolist()]) for p in along]),
        weight=np.stack([p.weight for p in along]),
    )
