"""What a sweep does with one setting: train what is missing, answer every order and seed on one split.

A module is trained once however many settings, orders, processes or repetitions need it. Trials that could need the
same modules take turns by the lease of one run in the storage, named after all that their keys have in common: who
comes second finds the modules in the library. Every order is a view of one evaluation (answering/evaluation.py); a
method whose tasks build on each other is trained and evaluated order by order.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from diki_ray.answering.answers import chances
from diki_ray.answering.evaluation import Evaluation
from diki_ray.answering.metrics import METRIC_NAMES, Metrics
from diki_ray.config import Config
from diki_ray.config.places import with_absolute_paths
from diki_ray.config.protocols import held_out_of
from diki_ray.config.sweep import SweepConfig, varied
from diki_ray.errors import LeaseHeldError
from diki_ray.learning.module import TaskModule
from diki_ray.runs.evaluate.split import evaluate_here
from diki_ray.runs.plan import (
    Plan,
    PlannedTask,
    device_of,
    is_sequential,
    plan_of,
    shared_by_keys,
)
from diki_ray.runs.progress import following
from diki_ray.runs.store_client import StoreClient
from diki_ray.runs.sweep.cost import Stream, cost_of
from diki_ray.runs.train.faults import injected_faults
from diki_ray.runs.train.group import train
from diki_ray.runs.train.worker import learn_all
from diki_ray.store.caches import Cache
from diki_ray.store.interface import HeldRun
from diki_ray.store.library import Library

METRICS = ("transfer", "average", "last", "forgetting", "zero_shot", "weight_auroc")
NEVER_SEEN = "never_seen"
"""Where the protocol keeps a data set away until the end, this is the accuracy on it once all the others are learnt."""
WAIT_S = 2.0

Report = Callable[[float, float], None]
"""Called with (epochs done of the modules that are trained, their mean validation accuracy so far)."""


def figures_of(evaluation: Evaluation, order: Sequence[int], held_out: int | None = None) -> dict[str, float | None]:
    """Every metric of one order of the tasks. weight_auroc: how well the integration weight tells learnt from unlearnt
    domains, mean over the steps of the stream. held_out: the task that the protocol keeps away until the end; with it
    there is `NEVER_SEEN`, where the order does keep it away."""
    accuracy = evaluation.accuracy(order)
    known = Metrics.of(accuracy)
    values = {m: known.mean(m) for m in METRICS if m in METRIC_NAMES}
    figures = {m: None if np.isnan(v) else float(v) for m, v in values.items()} | {
        "zero_shot": float(evaluation.zero_shot(order).mean()),
        "weight_auroc": spread(evaluation.weight_auroc(order))["mean"],
    }
    if held_out is not None:
        away = len(order) > 1 and order[-1] == held_out
        figures[NEVER_SEEN] = float(accuracy[-2, -1]) if away else None
    return figures


def judge(
    sweep: SweepConfig,
    config: Config,
    setting: Mapping[str, Any],
    orders: Mapping[str, Sequence[int]],
    split: str,
    folder: str,
    report: Report | None = None,
) -> dict[str, Any]:
    """Every metric of a setting on one split: mean, standard deviation, and the value for each order and seed.

    folder: where the setting's relative paths start, for this process has a folder of its own.

    seconds: training (or waiting for another who trains), the answers (tables), and the orders from them. cost: see
    `cost_of`.
    """
    streams: list[Stream] = []
    values: list[dict[str, Any]] = []
    seconds = dict.fromkeys(("train", "tables", "orders"), 0.0)
    epochs = None if report is None else Epochs(report, len(sweep.seeds), config.train.epochs)
    for seed in sweep.seeds:
        clock = time.monotonic()
        seeded = with_absolute_paths(varied(config, {**setting, "run.seed": seed}), folder)
        plan = plan_of(seeded)
        for ordered_plan, its_orders in _plans(plan, orders):
            digests = modules_of(ordered_plan, epochs)
            seconds["train"] += time.monotonic() - clock
            streams.append(Stream(ordered_plan, digests))
            clock = time.monotonic()
            evaluation = evaluated(ordered_plan, digests, list(its_orders.values()), split)
            seconds["tables"] += time.monotonic() - clock
            clock = time.monotonic()
            held_out = _held_out(ordered_plan)
            for name, order in its_orders.items():
                values.append({"order": name, "seed": seed} | figures_of(evaluation, order, held_out))
            seconds["orders"] += time.monotonic() - clock
            clock = time.monotonic()
    metrics = [m for m in (*METRICS, NEVER_SEEN) if m in values[0]]
    judged: dict[str, Any] = {m: spread([v[m] for v in values]) for m in metrics}
    return judged | {
        "objective": spread([sweep.objective.of(v) for v in values]),
        "values": values,
        "orders_by": _orders_by(varied(config, setting)),
        "seconds": {part: round(value, 2) for part, value in seconds.items()},
        "cost": cost_of(streams, (seconds["tables"] + seconds["orders"]) / len(values), split),
        "chance": float(np.mean(chances(config.evaluate.label_space, [len(t.class_names) for t in plan.tasks]))),
    }


def _held_out(plan: Plan) -> int | None:
    """The plan's task that its protocol keeps away until the end."""
    name, names = held_out_of(plan.config.protocol), [task.name for task in plan.tasks]
    return names.index(name) if name in names else None


def _plans(plan: Plan, orders: Mapping[str, Sequence[int]]) -> list[tuple[Plan, Mapping[str, Sequence[int]]]]:
    """Plans with the orders that one plan's modules answer: all of them, or, where modules build on each other, each
    order in a plan of its own (orders that begin alike share the modules of what they have in common)."""
    if not is_sequential(plan.config):
        return [(plan, orders)]
    return [(plan.in_order(order), {name: range(len(order))}) for name, order in orders.items()]


def _orders_by(config: Config) -> str:
    return "training" if is_sequential(config) else "indexing"


def modules_of(plan: Plan, epochs: Epochs | None = None) -> list[str]:
    """The digests of the plan's modules in the library, trained here if nobody has or is about to."""
    replayed: set[str] = set()
    while True:
        library = Library.open(plan.config.run.storage)
        found = [library.find_intact(task.key) for task in plan.tasks]
        for task, record in zip(plan.tasks, found, strict=True):
            if epochs is not None and record is not None and task.key not in replayed:
                replayed.add(task.key)
                epochs.replay(plan, task, TaskModule.from_bytes(library.read(record.digest)))
        if all(found):
            return [record.digest for record in found if record is not None]
        try:
            store = StoreClient.start(plan.config.run.storage, lease_of(plan), wait_s=0)
        except LeaseHeldError:
            time.sleep(WAIT_S)  # another trial trains them, or other modules of the same recipe
            continue
        try:
            # Between the look into the library and the lease another trial may have finished.
            missing = [task for task in plan.tasks if store.find_in_library(task.key) is None]
            replayed |= {task.key for task in missing}
            with nullcontext() if epochs is None else following(store, [epochs.of(plan)]):
                _train(plan, missing, store)
        finally:
            store.stop()


def lease_of(plan: Plan) -> str:
    """The run by whose lease those take turns that could train a module of the plan. Where one asks for `epochs` and
    another for as many by `min_steps`, they do not wait for each other: one of two equal modules is then kept."""
    return f"modules-{digest(shared_by_keys(plan.config, plan.backbone_digest))[:16]}"


def _train(plan: Plan, missing: Sequence[PlannedTask], store: HeldRun) -> None:
    config = plan.config
    if config.train.most_workers > 1 or config.schedule.concurrent_tasks > 1:
        if missing:
            train(config, missing, store)
        return
    # One worker needs no worker group: the trial itself is the worker, with a worker's number of threads.
    learn_all(missing, config, store, device_of(config), injected_faults(store))


class Epochs:
    """How far training is, over all tasks and seeds of a setting, and how good: what ASHA compares settings by.

    A module that is in the library already counts with the history that it was trained with, so that a setting is
    judged alike whoever trained its modules.
    """

    def __init__(self, report: Report, num_seeds: int, num_epochs: int):
        self._report, self._num_seeds, self._num_epochs = report, num_seeds, num_epochs
        self._best: dict[tuple[int, str], float] = {}
        self._done: dict[tuple[int, str], int] = {}

    def of(self, plan: Plan) -> _EpochListener:
        return _EpochListener(self, plan)

    def replay(self, plan: Plan, task: PlannedTask, module: TaskModule) -> None:
        for epoch, line in enumerate(module.provenance["history"]):
            self.add(plan, task.name, epoch, line.get("validation_accuracy"))

    def add(self, plan: Plan, task: str, epoch: int, accuracy: float | None) -> None:
        which = (plan.config.run.seed, task)
        if epoch < self._done.get(which, 0):
            return  # an epoch that is done again after a worker was lost
        self._done[which] = epoch + 1
        self._best[which] = max(self._best.get(which, 0.0), accuracy or 0.0)
        share = sum(self._done.values()) / (self._num_seeds * sum(t.num_epochs for t in plan.tasks))
        if share < 1:  # what is trained to its end is judged, not compared
            self._report(share * self._num_epochs, float(np.mean(list(self._best.values()))))


class _EpochListener:
    """Hears of the epochs of one seed's training."""

    def __init__(self, epochs: Epochs, plan: Plan):
        self._epochs, self._plan = epochs, plan

    def on_event(self, event: dict[str, Any]) -> None:
        if event["kind"] == "epoch":
            self._epochs.add(self._plan, event["task"], event["epoch"], event["validation_accuracy"])


def evaluated(plan: Plan, digests: Sequence[str], orders: Sequence[Sequence[int]], split: str) -> Evaluation:
    """One split along all of the orders, from modules in the library."""
    storage = plan.config.run.storage
    return evaluate_here(plan, digests, Library.open(storage).read, orders, split, Cache.open(storage))


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation over orders and seeds (n − 1; None for a single value)."""
    defined = [v for v in values if v is not None]
    if not defined:
        return {"mean": None, "std": None}
    std = float(np.std(defined, ddof=1)) if len(defined) > 1 else None
    return {"mean": float(np.mean(defined)), "std": std}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
