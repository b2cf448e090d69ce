"""What the answers along one order of the tasks say beyond the accuracy matrix: per class, by route, how far
confidences can be believed, and whether the integration weight tells learnt domains from unlearnt ones. Arrays in, JSON
values out.

Shapes: N images of a test set, n tasks learnt, T test sets. Row i of an array [n + 1, N] is what the images were
answered with after i tasks; row 0 is the frozen model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diki_ray.answering.metrics import Metrics, matrix_document, number
from diki_ray.answering.routing import NO_TASK

FORMAT = 1
NUM_BINS = 15
"""Confidences are put into so many bins, as calibration errors are usually reported (Guo et al. 2017)."""


@dataclass(frozen=True, eq=False)
class TestSet:
    """One test set with its answers along the order in which tasks are learnt."""

    __test__ = False  # pytest takes it for a test by its name

    name: str
    class_names: tuple[str, ...]
    data: str
    """Digest of the split's data: equal digests are equal images."""
    keys: tuple[str, ...]
    labels: np.ndarray  # int64 [N]
    learnt_at: int | None
    """Its task's place in the order, from 0; None: not learnt."""
    correct: np.ndarray  # bool [n + 1, N]
    confidence: np.ndarray  # float [n + 1, N]
    routed: np.ndarray  # int64 [n + 1, N], place in the order, NO_TASK: the frozen model
    weight: np.ndarray  # float64 [n + 1, N], integration weights


@dataclass(frozen=True, eq=False)
class Along:
    """The answers of a run under one routing and label space, along one order of its tasks."""

    run: str
    settings: Mapping[str, Any]
    """routing, label_space, split, order (names), protocol (None: not as the run's protocol has it), …"""
    test_sets: tuple[TestSet, ...]
    """The test sets of the order come first, in its order, then those of tasks that are not learnt."""
    notes: tuple[str, ...] = ()

    @property
    def num_learnt(self) -> int:
        return len(self.settings["order"])

    def accuracy(self) -> np.ndarray:
        """[n + 1, T], from the frozen model on."""
        return np.stack([t.correct.mean(1) for t in self.test_sets], axis=1)


def report(along: Along) -> dict[str, Any]:
    """The whole evaluation as JSON values; the matrix, zero-shot row and metrics as in results.json."""
    accuracy, n = along.accuracy(), along.num_learnt
    learnt = along.test_sets[:n]
    return {
        "format": FORMAT,
        "run": along.run,
        **along.settings,
        "notes": list(along.notes),
        **matrix_document(accuracy[0], accuracy[1:], Metrics.of(accuracy[1:, :n])),
        "test_sets": [_test_set(t, n) for t in along.test_sets],
        "confusion": confusion(along.test_sets, n),
        "calibration": {
            "learnt": calibration(*_joined(learnt, -1)),
            "zero_shot": calibration(*_joined(learnt, 0)),
        },
        "weight_auroc": weight_auroc(along.test_sets, n),
    }


def _test_set(t: TestSet, num_learnt: int) -> dict[str, Any]:
    return {
        "name": t.name,
        "learnt": t.learnt_at is not None,
        "num_images": len(t.labels),
        "data": t.data,
        "zero_shot": number(t.correct[0].mean()),
        "accuracy": number(t.correct[-1].mean()),
        "mean_class_accuracy": _mean([c["accuracy"] for c in per_class(t)]),
        "routed": routed_counts(t.routed[-1], num_learnt),
        "mean_weight": number(t.weight[-1].mean()),
        "ece": calibration(t.confidence[-1], t.correct[-1])["ece"],
        "classes": per_class(t),
    }


def routed_counts(routed: np.ndarray, num_tasks: int) -> dict[str, Any]:
    """How many images the frozen model answers, and each of `num_tasks` tasks; routed: int [N], NO_TASK or a task."""
    frozen, *tasks = np.bincount(routed - NO_TASK, minlength=num_tasks + 1).tolist()
    return {"frozen": frozen, "tasks": tasks}


def per_class(t: TestSet) -> list[dict[str, Any]]:
    """Accuracy on each class once all is learnt, beside zero-shot; None where a class has no image."""
    rows = []
    for c, name in enumerate(t.class_names):
        own = t.labels == c
        any_ = bool(own.any())
        rows.append(
            {
                "name": name,
                "num_images": int(own.sum()),
                "zero_shot": number(t.correct[0, own].mean()) if any_ else None,
                "accuracy": number(t.correct[-1, own].mean()) if any_ else None,
            }
        )
    return rows


def confusion(test_sets: Sequence[TestSet], num_learnt: int) -> dict[str, Any]:
    """Who answers whose images at the end, and how often that is their own task.

    counts: a row for each test set; a column for each task in the order, then the frozen model. own: the share of the
    learnt sets' images that their own task answers, each set counting the same.
    """
    counts, own = [], []
    for t in test_sets:
        row = np.bincount(np.where(t.routed[-1] == NO_TASK, num_learnt, t.routed[-1]), minlength=num_learnt + 1)
        counts.append([int(c) for c in row])
        if t.learnt_at is not None:
            own.append(row[t.learnt_at] / row.sum())
    return {
        "rows": [t.name for t in test_sets],
        "columns": [*(t.name for t in test_sets[:num_learnt]), "frozen"],
        "counts": counts,
        "own": _mean(own),
    }


def calibration(confidence: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS) -> dict[str, Any]:
    """Expected calibration error: Σ_b n_b/N · |accuracy_b − confidence_b| over bins of equal width, (lower, upper].

    bins: the count, mean confidence and accuracy of each; None where a bin is empty.
    """
    place = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    bins: list[dict[str, Any]] = []
    error = 0.0
    for b in range(num_bins):
        inside = place == b
        count = int(inside.sum())
        if not count:
            bins.append({"num_images": 0, "confidence": None, "accuracy": None})
            continue
        mean, right = float(confidence[inside].mean(dtype=np.float64)), float(correct[inside].mean())
        error += count / len(confidence) * abs(right - mean)
        bins.append({"num_images": count, "confidence": number(mean), "accuracy": number(right)})
    return {"ece": number(error), "num_images": len(confidence), "bins": bins}


def weight_auroc(test_sets: Sequence[TestSet], num_learnt: int) -> dict[str, Any]:
    """How well the integration weight tells images of learnt domains (they should get more) from unlearnt ones.

    after: the area under the ROC curve after each task, over all test sets; None once none is left to tell apart.
    0.5 is chance. mean: over the steps that have one.
    """
    after: list[float | None] = []
    for step in range(1, num_learnt + 1):
        known = [t.learnt_at is not None and t.learnt_at < step for t in test_sets]
        area = auroc([t.weight[step] for t in test_sets], known)
        after.append(None if area is None else number(area))
    return {"after": after, "mean": _mean(after)}


def auroc(weights: Sequence[np.ndarray], known: Sequence[bool]) -> float | None:
    """The area under the ROC curve of the weights [N_j] of each test set, given whether its domain is learnt; None
    where all or none are."""
    if all(known) or not any(known):
        return None
    from sklearn.metrics import roc_auc_score  # a second to import, which a first answer need not wait for

    truth = np.concatenate([np.full(len(w), k) for w, k in zip(weights, known, strict=True)])
    return float(roc_auc_score(truth, np.concatenate(weights)))


def _joined(test_sets: Sequence[TestSet], row: int) -> tuple[np.ndarray, np.ndarray]:
    confidence = np.concatenate([t.confidence[row] for t in test_sets])
    return confidence, np.concatenate([t.correct[row] for t in test_sets])


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [v for v in values if v is not None]
    return number(sum(defined) / len(defined)) if defined else None
