"""Any stored run, evaluated under any routing, label space and order of its tasks, in this process: nothing is trained,
no cluster is started, and what earlier evaluations have computed of the same thing is taken from the storage's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from diki_ray.answering.figures import Along
from diki_ray.config import Config
from diki_ray.config.protocols import protocol
from diki_ray.errors import ConfigError
from diki_ray.learning.module import TaskModule
from diki_ray.runs.evaluate.cache import NoCache
from diki_ray.runs.evaluate.split import evaluate_here
from diki_ray.runs.plan import Plan, PlannedTask, find_data, is_sequential, load_backbone, make_plan
from diki_ray.runs.progress import OnProgress
from diki_ray.runs.results import protocol_of
from diki_ray.runs.stored_run import check_backbone, config_of, find_stored_data, open_learnt
from diki_ray.store.caches import Cache
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
    on_progress: OnProgress = lambda what, done, total: None,
    named_data: bool = False,
) -> Along:
    """The answers of a stored run as they are asked for.

    config: the run's own by default. on_progress: see `OnProgress`. named_data: the data sets of `config` are those
    that the caller named, so that what is not prepared yet is prepared now; else they are what the storage says, and
    read as `find_stored_data` has it.

    Raises:
        ConfigError: no such run or task, no configuration, another backbone. DataError: a test set that cannot be read.
    """
    store = open_learnt(storage, run)
    config = _configured(config_of(store, config), storage, run, asked)
    data = find_data(config) if named_data else find_stored_data(store, config)
    backbone = load_backbone(config)
    whole = make_plan(config, backbone, data)
    check_backbone(store, backbone.name, whole.backbone_digest)
    plan, digests, notes = _learnt(store, whole)
    order = _order([t.name for t in plan.tasks], asked.order, run)
    if is_sequential(config) and order != list(range(len(order))):
        raise ConfigError(
            f"--order: each module of run {run!r} was trained from the one before it ({config.method.name}), so "
            "another order is other modules; train it with the tasks in that order, or ask for the first tasks of "
            f"{', '.join(t.name for t in plan.tasks)}."
        )
    cache = Cache(store.objects) if asked.cache else NoCache()
    evaluation = evaluate_here(plan, digests, store.read_module, [order], asked.split, cache, on_progress)
    names = [t.name for t in plan.tasks]
    settings = {
        "protocol": _protocol(plan, asked, len(order) == len(whole.tasks)),
        "routing": config.evaluate.routing,
        "label_space": config.evaluate.label_space,
        "split": asked.split,
        "order": [names[t] for t in order],
        "unlearnt": [name for t, name in enumerate(names) if t not in order],
        "calibration": config.calibration.form,
        "config_digest": config.digest(),
    }
    test_sets = evaluation.along(order, names, [t.index.digest(asked.split) for t in plan.tasks])
    return Along(run, settings, test_sets, tuple(notes))


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


def _protocol(plan: Plan, asked: Asked, whole: bool) -> str | None:
    """The full id that the numbers may be compared under; None where they are of something else."""
    config, name = plan.config, plan.config.protocol.partition("/")[0]
    if asked.split != "test" or not whole or asked.order is not None:
        return None
    if name != "own" and config.evaluate.label_space != protocol(name).label_space:
        return None
    return protocol_of(plan)


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
