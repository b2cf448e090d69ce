"""Count, mean and scatter of the frozen model's image features of a task: all that its Gaussian is made of.

Moments are kept in float64 and merge in any order (Chan, Golub and LeVeque, 1979), so workers accumulate apart, and ε
and shrinkage are applied when the moments are read, never when they are taken.

Shapes: N features, E embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
from torch import Tensor

Shrinkage = Literal["none", "oas", "ledoit_wolf"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean [E] and scatter [E, E] (sum of outer products of centred features), float64."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @staticmethod
    def empty(embed_dim: int) -> Moments:
        return Moments(0, np.zeros(embed_dim), np.zeros((embed_dim, embed_dim)))

    @staticmethod
    def of(features: Tensor | np.ndarray) -> Moments:
        """Moments of features [N, E]; any float dtype, computed in float64."""
        x = np.asarray(features, dtype=np.float64)
        if len(x) == 0:
            return Moments.empty(x.shape[1])
        mean = x.mean(axis=0)
        centred = x - mean
        return Moments(len(x), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together (Chan et al. 1979, equations 2.1)."""
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, mean, scatter)

    @staticmethod
    def merged(parts: Sequence[Moments]) -> Moments:
        """All parts together, in the order given: the same parts in the same order give the same bits."""
        return reduce(Moments.merge, parts)

    def covariance(self, eps: float = 1e-7, shrinkage: Shrinkage = "none") -> np.ndarray:
        """[E, E]: the unbiased covariance, shrunk towards a multiple of the identity if asked, plus ε·I.

        With fewer features than dimensions and no shrinkage it is singular but for ε.

        Raises:
            ValueError: fewer than two features.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 features, there are {self.count}")
        covariance = self.scatter / (self.count - 1)
        if shrinkage != "none":
            biased = self.scatter / self.count
            amount = {"oas": self._oas, "ledoit_wolf": self._ledoit_wolf}[shrinkage]()
            identity = np.eye(len(biased))
            covariance = (1 - amount) * biased + amount * (np.trace(biased) / len(biased)) * identity
        return covariance + eps * np.eye(len(covariance))

    def _oas(self) -> float:
        """Oracle approximating shrinkage (Chen et al. 2010, equation 23), in scikit-learn's form."""
        s, n, p = self.scatter / self.count, self.count, len(self.mean)
        alpha, mu = float((s**2).mean()), float(np.trace(s)) / p
        denominator = (n + 1) * (alpha - mu**2 / p)
        return 1.0 if denominator == 0 else min((alpha + mu**2) / denominator, 1.0)

    def _ledoit_wolf(self) -> float:
        """Ledoit and Wolf (2004), lemma 3.3. Needs Σ‖x−m‖⁴, which unit-norm features give from the moments:
        ‖x−m‖² = 1 + ‖m‖² − 2 m·x, and Σ(m·x)² = mᵀ(scatter + n m mᵀ)m."""
        s, n, p, m = self.scatter / self.count, self.count, len(self.mean), self.mean
        a, mm = 1 + m @ m, m @ m
        fourth = n * a**2 - 4 * a * n * mm + 4 * (m @ self.scatter @ m + n * mm**2)
        delta = ((s**2).sum() - np.trace(s) ** 2 / p) / p  # ‖S − μI‖² / p
        beta = min((fourth / n - (s**2).sum()) / (n * p), delta)
        return 0.0 if beta <= 0 else float(beta / delta)

    def packed(self) -> np.ndarray:
        """The scatter's lower triangle [E(E+1)/2]: half the bytes."""
        return self.scatter[np.tril_indices(len(self.mean))]

    @staticmethod
    def unpacked(count: int, mean: np.ndarray, packed: np.ndarray) -> Moments:
        scatter = np.zeros((len(mean), len(mean)))
        scatter[np.tril_indices(len(mean))] = packed
        return Moments(count, mean, scatter + np.tril(scatter, -1).T)
