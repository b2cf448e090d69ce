"""An evaluation's numbers and comparisons against hand-computed small cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from diki_ray.answering.comparison import aligned, compare, interval, scores
from diki_ray.answering.figures import Along, TestSet, calibration, report
from diki_ray.report.evaluation_in_terminal import comparison, tables


def hand(run: str = "hand", last: tuple[int, ...] = (1, 1, 0, 1)) -> Along:
    """Two tasks learnt of three, four images each; `last`: which of task a's images are right at the end."""
    none = np.full(4, -1)

    def test_set(name: str, learnt_at: int | None, correct: list[Any], routed: list[Any], weight: list[Any]) -> TestSet:
        return TestSet(
            name=name,
            class_names=("x", "y", "empty"),
            data=f"digest of {name}",
            keys=tuple(f"{name}{n}" for n in range(4)),
            labels=np.array([0, 0, 0, 1]),
            learnt_at=learnt_at,
            correct=np.array(correct, bool),
            confidence=np.array([[0.25] * 4, [0.5] * 4, [0.9, 0.9, 0.6, 0.6]]),
            routed=np.array(routed),
            weight=np.array(weight, float),
        )

    return Along(
        run,
        {"protocol": None, "routing": "image", "label_space": "task", "split": "test", "order": ["a", "b"]},
        (
            test_set(
                "a", 0,
                correct=[[1, 0, 0, 0], [1, 1, 1, 1], last],
                routed=[none, [0] * 4, [0, 0, 1, 0]],
                weight=[[0] * 4, [0.9, 0.8, 0.7, 0.2], [0.9] * 4],
            ),
            test_set(
                "b", 1,
                correct=[[0] * 4, [1, 0, 0, 0], [1, 1, 0, 0]],
                routed=[none, [0] * 4, [1] * 4],
                weight=[[0] * 4, [0.1] * 4, [0.8] * 4],
            ),
            test_set(
                "c", None,
                correct=[[1] * 4, [1, 1, 0, 0], [0] * 4],
                routed=[none, [0] * 4, [0, 1, 1, 1]],
                weight=[[0] * 4, [0.3, 0.1, 0.1, 0.1], [0.1, 0.1, 0.95, 0.95]],
            ),
        ),
    )  # fmt: skip


def test_accuracies_classes_routes_and_metrics_by_hand() -> None:
    document = report(hand())
    assert document["zero_shot"] == [0.25, 0.0, 1.0]
    assert document["accuracy"] == [[1.0, 0.25, 0.5], [0.75, 0.5, 0.0]]
    assert document["metrics"]["transfer"] == {"mean": 0.25, "per_task": [None, 0.25]}
    assert document["metrics"]["average"] == {"mean": 0.625, "per_task": [0.875, 0.375]}
    assert document["metrics"]["last"]["mean"] == 0.625
    assert document["metrics"]["forgetting"]["mean"] == 0.25
    a, _, c = document["test_sets"]
    assert a["classes"] == [
        {"name": "x", "num_images": 3, "zero_shot": 0.333333, "accuracy": 0.666667},
        {"name": "y", "num_images": 1, "zero_shot": 0.0, "accuracy": 1.0},
        {"name": "empty", "num_images": 0, "zero_shot": None, "accuracy": None},
    ]
    assert a["mean_class_accuracy"] == pytest.approx(5 / 6, abs=1e-6)
    assert (a["learnt"], c["learnt"]) == (True, False)
    assert a["routed"] == {"frozen": 0, "tasks": [3, 1]}
    assert document["confusion"] == {
        "rows": ["a", "b", "c"],
        "columns": ["a", "b", "frozen"],
        "counts": [[3, 1, 0], [0, 4, 0], [1, 3, 0]],
        "own": 0.875,
    }


def test_calibration_by_hand() -> None:
    """Four bins: (0.5, 0.75] holds 0.6 right, 0.75 wrong; (0.75, 1] holds 1.0 right; (0, 0.25] holds 0.25 wrong."""
    found = calibration(np.array([0.6, 0.75, 1.0, 0.25]), np.array([True, False, True, False]), num_bins=4)
    assert [b["num_images"] for b in found["bins"]] == [1, 0, 2, 1]
    assert found["bins"][2] == {"num_images": 2, "confidence": 0.675, "accuracy": 0.5}
    assert found["ece"] == pytest.approx((2 * abs(0.5 - 0.675) + 0 + 0.25) / 4, abs=1e-6)
    document = report(hand())["calibration"]
    # Of a and b at the end: at 0.9 four images, all right; at 0.6 four, one of them right.
    assert document["learnt"]["ece"] == pytest.approx((4 * 0.1 + 4 * abs(0.25 - 0.6)) / 8, abs=1e-6)
    assert document["zero_shot"]["ece"] == pytest.approx(abs(1 / 8 - 0.25), abs=1e-6)


def test_auroc_of_the_weight_by_hand() -> None:
    """After a: its weights .9 .8 .7 .2 against b and c's .1 ×7 and .3: of 32 pairs only (.2, .3) is the wrong way.
    After b: .9 ×4 and .8 ×4 against .1 .1 .95 .95: half of the pairs."""
    auroc = report(hand())["weight_auroc"]
    assert auroc == {"after": [0.96875, 0.5], "mean": 0.734375}
    everything = hand()
    learnt = replace(everything, test_sets=everything.test_sets[:2])
    assert report(learnt)["weight_auroc"]["after"][1] is None


# --- comparisons -----------------------------------------------------------------------------------------------------


def test_a_run_compared_with_itself_does_not_differ() -> None:
    document = compare(hand(), hand("again"))
    for line in document["metrics"].values():
        assert (line["difference"], line["low"], line["high"], line["significant"]) == (0, 0, 0, False)
    assert document["notes"] == []


def test_metrics_are_means_of_the_images_scores() -> None:
    run = hand()
    metrics = report(run)["metrics"]
    for metric in ("transfer", "average", "last"):
        found = [scores(t, metric) for t in run.test_sets[:2]]
        assert np.mean([s.mean() for s in found if s is not None]) == pytest.approx(metrics[metric]["mean"])


def test_differences_by_hand() -> None:
    document = compare(hand(), hand("worse", last=(0, 0, 0, 1)))
    assert document["metrics"]["last"] | {"low": 0, "high": 0} == {
        "run": 0.625, "other": 0.375, "difference": -0.25, "low": 0, "high": 0, "significant": False,
    }  # fmt: skip
    assert document["metrics"]["average"]["difference"] == -0.125
    assert document["metrics"]["transfer"]["difference"] == 0
    assert [t["last"]["difference"] for t in document["test_sets"]] == [-0.5, 0]


def test_the_interval_is_the_bootstrap_of_scipy_and_the_binomial() -> None:
    random = np.random.default_rng(0)
    values = np.array([1.0] * 30 + [0.0] * 50 + [-1.0] * 20)
    low, high = interval([values], 20_000, 0.95, random)
    reference = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert (low, high) == pytest.approx(tuple(reference), abs=0.011)  # a step of the mean is 0.01
    coin = np.array([1.0] * 40 + [0.0] * 60)
    exact = stats.binom(100, 0.4).ppf([0.025, 0.975]) / 100
    assert interval([coin], 50_000, 0.95, random) == pytest.approx(tuple(exact), abs=0.011)
    # Two test sets count the same, whatever their sizes; one that never varies halves the other's spread.
    low, high = interval([coin, np.ones(7)], 50_000, 0.95, random)
    assert (low, high) == pytest.approx(tuple((exact + 1) / 2), abs=0.006)


def test_images_are_paired_by_key_and_class_and_the_rest_is_said() -> None:
    run, other = hand(), hand("other")
    a = other.test_sets[0]
    swapped = replace(
        a,
        keys=("a3", "a2", "new", "a0"),
        labels=np.array([1, 0, 0, 0]),
        correct=a.correct[:, [3, 2, 1, 0]],
    )
    left, right = aligned(run.test_sets[0], swapped)
    assert (left.tolist(), right.tolist()) == ([0, 2, 3], [3, 1, 0])
    document = compare(run, replace(other, test_sets=(swapped, *other.test_sets[1:])))
    assert document["test_sets"][0]["num_images"] == 3
    assert document["metrics"]["last"]["difference"] == 0
    assert "a: 3 test images are in both, the others are left out" in document["notes"]
    strange = replace(a, keys=("p", "q", "r", "s"))
    document = compare(run, replace(other, test_sets=(strange, *other.test_sets[1:])))
    assert [t["name"] for t in document["test_sets"]] == ["b"]
    assert "a: not the same test images; left out" in document["notes"]


def test_a_wide_run_still_has_tables() -> None:
    document = report(hand())
    document["confusion"]["columns"] = [str(n) for n in range(40)]
    assert len([*tables(document)]) == 4
    assert len([*comparison(compare(hand(), hand("other", last=(0, 0, 0, 0))))]) == 1
