"""Accuracy matrix -> Transfer, Average, Last, forgetting, backward transfer (ZSCL, arXiv 2303.06628, and GEM's).

A[i, j]: accuracy on task j after learning task i, both from 0, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np


def transfer(column: np.ndarray, place: int) -> np.ndarray | None:
    """What a test set has before its task, at this place of the order, is learnt; not defined for the first.

    column: [T, …], accuracies after each task, or for each image whether it is right.
    """
    return column[:place].mean(0) if place else None


def average(column: np.ndarray, place: int) -> np.ndarray | None:
    """What a test set has on average over the whole stream."""
    return column.mean(0)


def last(column: np.ndarray, place: int) -> np.ndarray | None:
    """What a test set has at the end of the stream."""
    return column[-1].astype(float)


MEANS: Mapping[str, Callable[[np.ndarray, int], np.ndarray | None]] = {
    "transfer": transfer,
    "average": average,
    "last": last,
}
"""The metrics that are means over images: of a matrix's column they give the task's metric, of images their shares."""


@dataclass(frozen=True, eq=False)
class Metrics:
    """Per task [T] and averaged over tasks; a value that is not defined (Transfer of the first task, everything about
    forgetting of the last) is NaN per task and left out of the mean."""

    transfer: np.ndarray  # mean of A[i, j] over i < j
    average: np.ndarray  # mean of A[i, j] over i
    last: np.ndarray  # A[T-1, j]
    forgetting: np.ndarray  # max over i in [j, T-1) of A[i, j], less A[T-1, j]
    backward_transfer: np.ndarray  # A[T-1, j] less A[j, j]

    @staticmethod
    def of(accuracy: np.ndarray) -> Metrics:
        """accuracy: [T, T]."""
        a = np.asarray(accuracy, dtype=np.float64)
        t = len(a)
        nan = float("nan")

        def of_tasks(name: str) -> np.ndarray:
            values = [MEANS[name](a[:, j], j) for j in range(t)]
            return np.array([nan if v is None else v for v in values])

        return Metrics(
            transfer=of_tasks("transfer"),
            average=of_tasks("average"),
            last=of_tasks("last"),
            forgetting=np.array([a[j:-1, j].max() - a[-1, j] if j < t - 1 else nan for j in range(t)]),
            backward_transfer=np.array([a[-1, j] - a[j, j] if j < t - 1 else nan for j in range(t)]),
        )

    def mean(self, name: str) -> float:
        """The mean over tasks; NaN when it is defined for none (a stream of one task has no Transfer)."""
        values = getattr(self, name)
        defined = values[~np.isnan(values)]
        return float(defined.mean()) if len(defined) else float("nan")


METRIC_NAMES = tuple(field.name for field in fields(Metrics))
"""The names of all metrics, in the order in which people are shown them."""


def matrix_document(zero_shot: np.ndarray, accuracy: np.ndarray, metrics: Metrics) -> dict[str, Any]:
    """Zero-shot row [T], matrix [n, T] and metrics as JSON values, in results.json as in other documents."""
    return {
        "zero_shot": numbers(zero_shot),
        "accuracy": [numbers(row) for row in accuracy],
        "metrics": {
            name: {"mean": number(metrics.mean(name)), "per_task": numbers(values)}
            for name, values in vars(metrics).items()
        },
    }


def number(value: float) -> float | None:
    """Rounded to 6 places; NaN, which is a figure that is not defined, is null."""
    return None if math.isnan(value) else round(float(value), 6)


def numbers(values: np.ndarray) -> list[float | None]:
    return [number(v) for v in values]
