"""A sweep with Ray Tune: every setting is judged over all orders and seeds on the validation split; the chosen one's
test numbers are computed once (diki_ray.runs.sweep.trial says how).

Each setting's result is a document in the storage, written by the driver when it is known: an interrupted sweep that is
started again hands Tune only what has none, and so does a repeated one. Tune's own state is never read back.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from diki_ray.config import Config
from diki_ray.config.places import with_absolute_paths
from diki_ray.config.sweep import Range, SweepConfig, orders_of, pareto_front, setting_text, varied
from diki_ray.errors import ConfigError, UserError
from diki_ray.runs.plan import Plan, plan_of
from diki_ray.runs.sweep.files import write_files
from diki_ray.runs.sweep.results import SweepResults
from diki_ray.runs.sweep.trial import digest, judge
from diki_ray.store.objects import Objects

Orders = Mapping[str, Sequence[int]]


def run_sweep(sweep: SweepConfig, config: Config, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs what has no result yet and returns the sweep's document, which is also in the storage with its report.

    Raises:
        UserError: every setting failed, or the configuration cannot be run.
    """
    started = time.monotonic()
    config = with_absolute_paths(config)
    plan = plan_of(config)  # what is wrong with it is said before any trial starts
    orders = orders_of(sweep.orders, [t.name for t in plan.tasks])
    results = SweepResults(config.run.storage, sweep.name, question_of(sweep, plan, orders))
    before = results.num_modules()
    _run_trials(sweep, config, orders, results, say)
    trials = results.trials(sweep)
    good = [t for t in trials if t["validation"]]
    if not good:
        said = next((t["error"] for t in trials if t["error"]), "no setting ran to its end")
        raise UserError(f"sweep {sweep.name!r}: no setting has a result; the first error: {said}")
    best = max(good, key=lambda t: t["validation"]["objective"]["mean"])
    say(f"chosen on validation: {setting_text(best['setting'])}; its test numbers …")
    test = _tested(sweep, config, best["setting"], orders, results)
    front = pareto_front([(t["validation"]["transfer"]["mean"] or 0.0, t["validation"]["last"]["mean"]) for t in good])
    document = {
        "format": 1,
        "sweep": sweep.model_dump(mode="json"),
        "config": config.model_dump(mode="json"),
        "tasks": [t.name for t in plan.tasks],
        "orders": {name: list(order) for name, order in orders.items()},
        "trials": trials,
        "pareto": [good[i]["setting"] for i in front],
        "chosen": {"setting": best["setting"], "validation": best["validation"], "test": test},
        "modules_trained": results.num_modules() - before,
        "seconds": round(time.monotonic() - started, 2),
        "folder": results.uri,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_files(document, with_absolute_paths(varied(config, best["setting"])), results)
    return document


def question_of(sweep: SweepConfig, plan: Plan, orders: Orders) -> str:
    """What a setting's result depends on beside the setting: the configuration it changes, data, orders, seeds."""
    data = [task.index.digest() for task in plan.tasks]
    return digest([plan.config.digest(), plan.backbone_digest, data, sorted(map(list, orders.values())), sweep.seeds])


def _run_trials(
    sweep: SweepConfig, config: Config, orders: Orders, results: SweepResults, say: Callable[[str], None]
) -> None:
    """Has Tune try every setting that has no result yet."""
    known = [t for t in results.trials(sweep) if not t["error"]]
    space: dict[str, Any]
    if sweep.search == "optuna":
        done = sum(t["num_tried"] for t in known)
        missing = sweep.num_samples - done
        space = {_flat(name): _domain(values) for name, values in sweep.parameters.items()}
    else:
        settings = [s for s in sweep.settings() if s not in [t["setting"] for t in known]]
        done, missing = len(known), len(settings)
        space = {"setting": tune.grid_search(settings)}
    if known:
        say(f"known already: {done} of {done + missing} settings")
    if missing <= 0:
        return
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's tables and hints, of which verbose=0 leaves some
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # a signal is the command's (runs/stopping.py)
    # A trial reports what ASHA compares while it trains, and what Optuna asks for at its end: never both at once.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failure is said in a sentence, by the recorder
    optuna = sweep.search == "optuna"
    experiment = f"{sweep.name}-{int(time.time())}"
    recorder = _Recorder(results, missing, say)
    tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_trial, sweep=sweep, config=config, orders=orders, folder=os.getcwd()),
            # A trial has to ask for something: one MB of memory is everywhere.
            {"CPU": sweep.cpus_per_trial, "GPU": sweep.gpus_per_trial, "memory": 2**20},
        ),
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=missing if optuna else 1,
            max_concurrent_trials=sweep.concurrent_trials if optuna else None,
            search_alg=_Optuna.knowing(sweep, known)
            if optuna
            else tune.search.BasicVariantGenerator(max_concurrent=sweep.concurrent_trials),
            scheduler=_scheduler(sweep, config),
            reuse_actors=sweep.scheduler == "none",  # a trial that was stopped may still be in the middle of a step
        ),
        run_config=tune.RunConfig(
            name=experiment,
            storage_path=f"{Objects.open(config.run.storage).uri}/tune",
            failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
            callbacks=[recorder],
            verbose=0,
        ),
    ).fit()
    if recorder.num_ended < missing:  # Tune returns after Ctrl-C as well, and survives a result that cannot be kept
        raise UserError(
            f"sweep {sweep.name!r} ended with {recorder.num_ended} of {missing} results: it was interrupted, or one "
            "could not be written to the storage. Run the same command again, it goes on from there."
        )
    # Tune's own files, those of interrupted tries too: nothing of ours depends on them.
    objects = Objects.open(config.run.storage)
    ours = re.compile(rf"tune/{re.escape(sweep.name)}-\d+/")
    objects.delete(info.path for info in objects.list("tune") if ours.match(info.path))


def _trial(values: dict[str, Any], *, sweep: SweepConfig, config: Config, orders: Orders, folder: str) -> None:
    """One setting; runs in a Tune trial. Training reports each epoch, so that ASHA can stop it."""

    def report(epoch: float, accuracy: float) -> None:
        tune.report({"epoch": epoch, "accuracy": accuracy})

    try:
        asha = sweep.scheduler == "asha"
        judged = judge(sweep, config, _setting(values), orders, "val", folder, report if asha else None)
    except ConfigError as error:  # trying again would only meet it again
        tune.report({"refused": str(error)})
        return
    tune.report({"objective": judged["objective"]["mean"], "judged": json.dumps(judged)})


class _Recorder(tune.Callback):
    """Writes each setting's result as soon as it is known, and says so."""

    def __init__(self, results: SweepResults, num_settings: int, say: Callable[[str], None]):
        self._results, self._num_settings, self._say, self.num_ended = results, num_settings, say, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result
        if "judged" in last:
            judged = json.loads(last["judged"])
            self._record(trial, f"objective {100 * judged['objective']['mean']:.1f} %", validation=judged)
        elif "refused" in last:
            self._record(trial, last["refused"], error=last["refused"])
        else:
            epoch = round(last.get("epoch", 0.0), 2)
            self._record(trial, f"stopped early, after {epoch:g} epochs", stopped_at_epoch=epoch)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(f"{setting_text(_setting(trial.config))}: failed and is tried again")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._record(trial, f"failed: {_sentence(trial)}", error=_sentence(trial))

    def _record(self, trial: Any, outcome: str, **fields: Any) -> None:
        setting = _setting(trial.config)
        self._results.record(setting, **fields)
        self.num_ended += 1
        self._say(f"[{self.num_ended}/{self._num_settings}] {setting_text(setting)}: {outcome}")


class _Optuna(OptunaSearch):
    """Optuna's search, which is told only what settings reached, not how their training went on the way."""

    @staticmethod
    def knowing(sweep: SweepConfig, known: Sequence[Mapping[str, Any]]) -> _Optuna:
        """The search after the results that are known."""
        judged = [t for t in known if t["validation"]]
        return _Optuna(
            metric="objective",
            mode="max",
            # Another seed than before the interruption: else the same settings would be drawn once more.
            seed=sweep.search_seed + len(known),
            points_to_evaluate=[{_flat(n): v for n, v in t["setting"].items()} for t in judged] or None,
            evaluated_rewards=[t["validation"]["objective"]["mean"] for t in judged] or None,
        )

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self.metric in result:
            super().on_trial_result(trial_id, result)


def _scheduler(sweep: SweepConfig, config: Config) -> Any:
    if sweep.scheduler == "none":
        return None
    # max_t above the last epoch: at max_t ASHA ends a trial, and this one has still to be judged.
    return ASHAScheduler(
        time_attr="epoch", metric="accuracy", mode="max", max_t=config.train.epochs + 1, reduction_factor=3
    )


def _tested(
    sweep: SweepConfig, config: Config, setting: Mapping[str, Any], orders: Orders, results: SweepResults
) -> dict[str, Any]:
    """The chosen setting's numbers on the test split, where the trials ran: the driver may have no GPU."""
    if (known := results.tested(setting)) is not None:
        return known
    task = ray.remote(num_cpus=sweep.cpus_per_trial, num_gpus=sweep.gpus_per_trial, max_retries=sweep.max_failures)(
        judge
    )
    try:
        test = ray.get(task.remote(sweep, config, setting, orders, "test", os.getcwd()))
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
    results.record_test(setting, test)
    return test


def _domain(values: list[Any] | Range) -> Any:
    if isinstance(values, list):
        return tune.choice(values)
    if values.integer:
        low, high = int(values.low), int(values.high) + 1
        return tune.lograndint(low, high) if values.log else tune.randint(low, high)
    return tune.loguniform(values.low, values.high) if values.log else tune.uniform(values.low, values.high)


def _flat(name: str) -> str:
    """Tune and Optuna read dots and slashes as nesting."""
    return name.replace(".", "__")


def _setting(values: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's setting: given as a whole, or field by field by Optuna."""
    return values["setting"] if "setting" in values else {n.replace("__", "."): v for n, v in values.items()}


def _sentence(trial: Any) -> str:
    """The last line of what a trial died of; Ray's errors carry whole tracebacks and descriptions of processes."""
    error = trial.get_pickled_error() or trial.get_error()
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process was killed or crashed"
    lines = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
