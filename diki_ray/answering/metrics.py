"""Accuracy matrix -> Transfer, Average, Last, forgetting, backward transfer (ZSCL, arXiv 2303.06628, and GEM's).

A[i, j]: accuracy on task j after learning task i, both from 0, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
        return Metrics(
            transfer=np.array([a[:j, j].mean() if j else nan for j in range(t)]),
            average=a.mean(axis=0),
            last=a[-1].copy(),
            forgetting=np.array([a[j:-1, j].max() - a[-1, j] if j < t - 1 else nan for j in range(t)]),
            backward_transfer=np.array([a[-1, j] - a[j, j] if j < t - 1 else nan for j in range(t)]),
        )

    def mean(self, name: str) -> float:
        """The mean over tasks; NaN when it is defined for none (a stream of one task has no Transfer)."""
        values = getattr(self, name)
        defined = values[~np.isnan(values)]
        return float(defined.mean()) if len(defined) else float("nan")
