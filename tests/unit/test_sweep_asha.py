"""What ASHA compares: how far the training of all modules of a setting is, and how good they are so far."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from diki_ray.config import load
from diki_ray.config.sweep import SweepConfig
from diki_ray.runs.sweep.sweep import _Optuna, _scheduler
from diki_ray.runs.sweep.trial import Epochs

DEBUG = Path(__file__).parents[2] / "configs/debug.yaml"


def plan(seed: int = 0) -> Any:
    config, task = SimpleNamespace(run=SimpleNamespace(seed=seed)), SimpleNamespace(num_epochs=3)
    return SimpleNamespace(config=config, tasks=[task] * 2)


def test_progress_is_over_all_tasks_and_seeds_and_counts_the_best_epoch() -> None:
    said: list[tuple[float, float]] = []
    epochs = Epochs(lambda epoch, accuracy: said.append((epoch, accuracy)), num_seeds=2, num_epochs=3)
    for epoch, accuracy in enumerate((0.2, 0.6, 0.4)):
        epochs.add(plan(), "a", epoch, accuracy)
    epochs.add(plan(), "a", 2, 0.9)  # done again after a worker was lost: heard already
    epochs.replay(
        plan(), SimpleNamespace(name="b"), SimpleNamespace(provenance={"history": [{"validation_accuracy": 0.8}] * 3})
    )  # type: ignore[arg-type]
    listener = epochs.of(plan(seed=1))
    listener.on_event({"kind": "step", "task": "a"})
    for task in "ab":
        for epoch in range(3):
            listener.on_event({"kind": "epoch", "task": task, "epoch": epoch, "validation_accuracy": None})
    assert [round(e, 6) for e, _ in said] == [n / 4 for n in range(1, 12)]
    assert [round(a, 6) for _, a in said[:6]] == [0.2, 0.6, 0.6, 0.7, 0.7, 0.7]
    # The last of the twelve is not compared any more: the setting is judged.
    assert said[-1] == (11 / 4, pytest.approx((0.6 + 0.8 + 0 + 0) / 4))


def test_a_setting_that_falls_behind_is_stopped_and_one_that_is_trained_is_judged() -> None:
    sweep = SweepConfig(name="s", base="x", scheduler="asha")
    scheduler = _scheduler(sweep, load(DEBUG, ["train.epochs=3"]))
    good, bad = (SimpleNamespace(trial_id=name) for name in ("good", "bad"))
    for trial in (good, bad):
        scheduler.on_trial_add(None, trial)
    for epoch in (0.5, 1.0, 2.0, 3.0):
        result = {"epoch": epoch, "accuracy": 0.8}
        assert scheduler.on_trial_result(None, good, result) == TrialScheduler.CONTINUE  # at the last epoch as well
    judged = {"objective": 0.3, "judged": "{}"}
    assert scheduler.on_trial_result(None, good, judged) == TrialScheduler.CONTINUE
    scheduler.on_trial_complete(None, good, judged)
    assert scheduler.on_trial_result(None, bad, {"epoch": 0.5, "accuracy": 0.1}) == TrialScheduler.CONTINUE
    assert scheduler.on_trial_result(None, bad, {"epoch": 1.0, "accuracy": 0.1}) == TrialScheduler.STOP


def test_optuna_hears_of_results_and_not_of_epochs() -> None:
    sweep = SweepConfig.model_validate({"name": "s", "base": "x", "search": "optuna", "parameters": {"a.b": [1, 2]}})
    known = [{"setting": {"a.b": 1}, "validation": {"objective": {"mean": 0.5}}}]
    from ray import tune

    search = _Optuna.knowing(sweep, known)
    assert search.set_search_properties(None, None, {"a__b": tune.choice([1, 2])})
    assert [t.value for t in search._ot_study.trials] == [0.5]
    assert search.suggest("stopped")["a__b"] in (1, 2)
    search.on_trial_result("stopped", {"epoch": 1.0, "accuracy": 0.9, "training_iteration": 1})
    search.on_trial_complete("stopped", {"epoch": 1.0, "accuracy": 0.9})
    search.suggest("judged")
    search.on_trial_complete("judged", {"objective": 0.7})
    assert [t.state.name for t in search._ot_study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
