"""A sweep with Ray Tune: every setting is judged over all orders and seeds on the validation split; the chosen one's
test numbers are computed once.

A module is trained once however many settings, orders, processes or repetitions need it: a trial takes a lease on the
set of modules that it misses (a run of that name in the storage); who needs the same ones waits for it and finds them
in the library. Under `image` routing the accuracy matrix of every order follows from one table for each test set
(diki_ray.model.orders). `batch` routing is not exact that way and is evaluated order by order.

Each setting's result is a document in the storage, written when it is known: an interrupted sweep that is started again
finds them, and so does a repeated one.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune

from diki_ray.config import Config
from diki_ray.errors import LeaseHeldError, UserError
from diki_ray.model.metrics import Metrics
from diki_ray.model.orders import Orders
from diki_ray.runtime.evaluator import Cache, Evaluating, Part, accuracy_of, num_batches_of
from diki_ray.runtime.objects import Objects
from diki_ray.runtime.plan import Plan, PlannedTask, build_method, load_backbone, make_plan, with_absolute_paths
from diki_ray.runtime.store import RunStore
from diki_ray.runtime.store_actor import StoreClient
from diki_ray.runtime.trainer import TaskWorker, train
from diki_ray.sweep_config import Range, SweepConfig, orders_of, pareto_front, varied

METRICS = ("transfer", "average", "last", "forgetting")
WAIT_S = 2.0


def run_sweep(sweep: SweepConfig, config: Config) -> dict[str, Any]:
    """Runs what has no result yet and returns the sweep's document, which is also in the storage.

    Raises:
        UserError: every setting failed, or the configuration cannot be run.
    """
    started = time.monotonic()
    config = with_absolute_paths(config)
    plan = make_plan(config, load_backbone(config))  # what is wrong with it is said before any trial starts
    orders = orders_of(sweep.orders, [t.name for t in plan.tasks])
    results = Results(config.run.storage, sweep.name)
    before = len(results.library_keys())
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_trial, sweep=sweep, config=config, orders=orders),
            {"CPU": sweep.cpus_per_trial, "GPU": sweep.gpus_per_trial},
        ),
        param_space={_safe(n): _domain(sweep, v) for n, v in sweep.parameters.items()}
        or {"nothing": tune.grid_search([0])},
        tune_config=tune.TuneConfig(
            metric="objective",
            mode="max",
            num_samples=1 if sweep.search == "grid" else sweep.num_samples,
            max_concurrent_trials=sweep.concurrent_trials if sweep.search == "optuna" else None,
            search_alg=_searcher(sweep),
            scheduler=_scheduler(sweep, config),
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(
            name=f"{sweep.name}-{int(time.time())}",
            storage_path=f"{Objects.open(config.run.storage).uri}/tune",
            failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
            verbose=0,
        ),
    )
    grid = tuner.fit()
    trials = [_shown(grid[i], sweep) for i in range(len(grid))]
    good = [t for t in trials if t["error"] is None and not t["stopped_early"]]
    if not good:
        said = next((t["error"] for t in trials if t["error"]), "no setting ran to its end")
        raise UserError(f"sweep {sweep.name!r}: no setting has a result; the first error: {said}")
    best = max(good, key=lambda t: t["validation"]["objective"]["mean"])
    chosen = _judged(sweep, config, best["setting"], orders, "test", results)
    front = pareto_front([(t["validation"]["transfer"]["mean"] or 0.0, t["validation"]["last"]["mean"]) for t in good])
    document = {
        "format": 1,
        "sweep": sweep.model_dump(mode="json"),
        "config": config.model_dump(mode="json"),
        "tasks": [t.name for t in plan.tasks],
        "orders": {name: list(order) for name, order in orders.items()},
        "trials": trials,
        "pareto": [good[i]["setting"] for i in front],
        "chosen": {"setting": best["setting"], "validation": best["validation"], "test": chosen},
        "modules_trained": len(results.library_keys()) - before,
        "seconds": round(time.monotonic() - started, 2),
    }
    results.put("sweep.json", document)
    return document


def _trial(setting: dict[str, Any], *, sweep: SweepConfig, config: Config, orders: Mapping[str, Sequence[int]]) -> None:
    """One setting; runs in a Tune trial. Training reports each epoch, so that ASHA can stop it."""
    fields = {n.replace("/", "."): v for n, v in setting.items() if n != "nothing"}
    results = Results(config.run.storage, sweep.name)
    judged = _judged(sweep, config, fields, orders, "val", results, reporting=sweep.scheduler == "asha")
    tune.report({"objective": judged["objective"]["mean"], "judged": json.dumps(judged), "epoch": config.train.epochs})


def _judged(
    sweep: SweepConfig,
    config: Config,
    setting: Mapping[str, Any],
    orders: Mapping[str, Sequence[int]],
    split: str,
    results: Results,
    reporting: bool = False,
) -> dict[str, Any]:
    """Mean, standard deviation and each value of every metric over orders and seeds, on one split."""
    varied_config = varied(config, setting)
    name = f"{split}-{_digest([varied_config.digest(), sorted(map(list, orders.values())), sweep.seeds, split])}.json"
    if (known := results.get(name)) is not None:
        return known | {"objective": _spread([sweep.objective.of(v) for v in known["values"]])}
    started, values, names = time.monotonic(), [], []
    for seed in sweep.seeds:
        seeded = varied(varied_config, {"run.seed": seed})
        plan = make_plan(seeded, load_backbone(seeded))
        digests = modules_of(plan, results, reporting)
        matrices = matrices_of_orders(plan, digests, orders, split, results)
        for order, (accuracy, zero_shot) in matrices.items():
            metrics = Metrics.of(accuracy)
            values.append({m: metrics.mean(m) for m in METRICS} | {"zero_shot": float(zero_shot.mean())})
            names.append({"order": order, "seed": seed})
    judged: dict[str, Any] = {m: _spread([v[m] for v in values]) for m in (*METRICS, "zero_shot")}
    judged |= {"values": values, "of": names, "seconds": round(time.monotonic() - started, 2)}
    results.put(name, judged)
    return judged | {"objective": _spread([sweep.objective.of(v) for v in values])}


def modules_of(plan: Plan, results: Results, reporting: bool = False) -> list[str]:
    """The digests of the plan's modules in the library, trained here if nobody has or is about to."""
    while True:
        library = RunStore.open(plan.config.run.storage, "library").library
        found = [library.find_intact(task.key) for task in plan.tasks]
        missing = [task for task, record in zip(plan.tasks, found, strict=True) if record is None]
        if not missing:
            return [record.digest for record in found if record is not None]
        claim = f"modules-{_digest(sorted(t.key for t in plan.tasks))[:16]}"
        try:
            store = StoreClient.start(plan.config.run.storage, claim, wait_s=0)
        except LeaseHeldError:
            time.sleep(WAIT_S)  # another trial trains them: take them when they are there
            continue
        try:
            _train_missing(plan, missing, store, reporting)
        finally:
            store.stop()


def _train_missing(plan: Plan, missing: Sequence[PlannedTask], store: StoreClient, reporting: bool) -> None:
    config = plan.config
    still = [task for task in missing if store.find_in_library(task.key) is None]
    if config.train.num_workers > 1:
        train(config, still, store)
        return
    # One worker needs no worker group: the trial itself is the worker.
    worker = TaskWorker(config, build_method(config, load_backbone(config)), store)
    for number, task in enumerate(still):
        if reporting:
            worker.on_epoch = _reporter(number, len(still), config.train.epochs)
        worker.learn(task)


def _reporter(number: int, num_tasks: int, num_epochs: int) -> Any:
    """Tells Tune the validation accuracy after each epoch, as a share of the way through all tasks' epochs."""

    def report(epoch: int, accuracy: float | None) -> None:
        done = (number * num_epochs + epoch + 1) / num_tasks
        tune.report({"objective": accuracy or 0.0, "epoch": done})

    return report


def matrices_of_orders(
    plan: Plan, digests: Sequence[str], orders: Mapping[str, Sequence[int]], split: str, results: Results
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Order's name -> (accuracy matrix [T, T] in that order, zero-shot row [T] in that order)."""
    if plan.config.evaluate.routing == "batch":
        return {name: _directly(plan, digests, order, split, results) for name, order in orders.items()}
    tables = [p.answers for p in _tables(plan, digests, list(orders.values()), split, results)]
    by_set = Orders(tables, [t.class_names for t in plan.tasks], plan.config.evaluate.label_space)
    return {name: (by_set.accuracy(order), by_set.zero_shot(order)) for name, order in orders.items()}


def _tables(
    plan: Plan, digests: Sequence[str], orders: Sequence[Sequence[int]], split: str, results: Results
) -> list[Part]:
    """For each task the answers of its split under every route that one of the orders takes."""
    store = results.caches()
    caches = [Cache(plan, store, j, digests, split) for j in range(len(plan.tasks))]
    known = [cache.load() for cache in caches]
    evaluating = Evaluating(plan.config, plan.tasks, digests, results.read_module, split, orders)
    parts = []
    for j, (task, cache) in enumerate(zip(plan.tasks, caches, strict=True)):
        part = evaluating.evaluate(j, range(num_batches_of(plan.config, task, split)), known[j])
        cache.save(part)
        parts.append(part)
    return parts


def _directly(
    plan: Plan, digests: Sequence[str], order: Sequence[int], split: str, results: Results
) -> tuple[np.ndarray, np.ndarray]:
    tasks = [plan.tasks[t] for t in order]
    evaluating = Evaluating(plan.config, tasks, [digests[t] for t in order], results.read_module, split)
    parts = [evaluating.evaluate(j, range(num_batches_of(plan.config, t, split))) for j, t in enumerate(tasks)]
    evaluation = accuracy_of(plan.config, tasks, parts)
    return evaluation.accuracy, evaluation.zero_shot


class Results:
    """A sweep's documents in the storage, and what its trials read there."""

    def __init__(self, storage: str, sweep: str):
        self.storage, self.sweep = storage, sweep
        self.objects = Objects.open(storage)

    def get(self, name: str) -> Any:
        data = self.objects.get(f"sweeps/{self.sweep}/{name}")
        return None if data is None else json.loads(data)

    def put(self, name: str, document: Any) -> None:
        text = json.dumps(document, indent=1, sort_keys=True, default=float)
        self.objects.put(f"sweeps/{self.sweep}/{name}", text.encode())

    def caches(self) -> RunStore:
        return RunStore.open(self.storage, "library")

    def read_module(self, digest: str) -> bytes:
        return self.caches().library.read(digest)

    def library_keys(self) -> list[str]:
        return [Path(info.path).stem for info in self.objects.list("library/keys")]


def _shown(result: Any, sweep: SweepConfig) -> dict[str, Any]:
    setting = {n.replace("/", "."): v for n, v in (result.config or {}).items() if n != "nothing"}
    judged = json.loads(result.metrics["judged"]) if result.metrics and "judged" in result.metrics else None
    error = None
    if result.error is not None:
        cause = getattr(result.error, "cause", None) or result.error
        lines = [line for line in str(cause).splitlines() if line.strip()]
        error = lines[-1] if lines else type(cause).__name__
    return {"setting": setting, "validation": judged, "error": error, "stopped_early": judged is None and error is None}


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation over orders and seeds (n − 1; None for a single value)."""
    defined = [v for v in values if not math.isnan(v)]
    if not defined:
        return {"mean": None, "std": None}
    std = float(np.std(defined, ddof=1)) if len(defined) > 1 else None
    return {"mean": float(np.mean(defined)), "std": std}


def _safe(name: str) -> str:
    """Optuna and Tune read dots as nesting."""
    return name.replace(".", "/")


def _domain(sweep: SweepConfig, values: list[Any] | Range) -> Any:
    if isinstance(values, list):
        return tune.grid_search(values) if sweep.search == "grid" else tune.choice(values)
    if values.integer:
        low, high = int(values.low), int(values.high) + 1
        return tune.lograndint(low, high) if values.log else tune.randint(low, high)
    return tune.loguniform(values.low, values.high) if values.log else tune.uniform(values.low, values.high)


def _searcher(sweep: SweepConfig) -> Any:
    if sweep.search != "optuna":
        return tune.search.BasicVariantGenerator(max_concurrent=sweep.concurrent_trials, random_state=0)
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(seed=0)


def _scheduler(sweep: SweepConfig, config: Config) -> Any:
    if sweep.scheduler == "none":
        return None
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(time_attr="epoch", max_t=config.train.epochs, grace_period=1, reduction_factor=3)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
