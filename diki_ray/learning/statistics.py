"""What a task's images leave behind: sums of their frozen features that add up exactly, by class.

Features are rounded to multiples of 2⁻²⁰ and summed as integers. Sums of integers depend neither on the order of their
parts nor on how they were grouped: any number of workers, a data set that grew, and an image that is taken back give
the bits that one pass over the images would give. The rounding, at most 4.8e-7 of a feature of norm 1, is that of the
float32 features themselves.

Shapes: N features, E embedding dimensions, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
from torch import Tensor

from diki_ray.errors import CorruptError, DataError
from diki_ray.learning.moments import Moments

GRID = 2.0**20
"""Steps of a rounded feature per unit."""
EXACT_ROWS = 4096
"""Rows whose products are summed in float64 at once: 4,096 · 2⁴⁰ = 2⁵² is the last sum that is sure to be exact."""
LARGEST = 2**62
"""No sum may reach it; 4 million images whose features all lie in one dimension would."""
MOST_DIMENSIONS = 8192
"""No embedding has more; those of the largest CLIPs have several times fewer. The second moments of more would fill a
machine's memory when a few megabytes of a stored file are read."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Counts [C], sums Σ x of each class [C, E] in units of 1 / GRID, and Σ x xᵀ over all [E, E] in units of
    1 / GRID², all int64."""

    counts: np.ndarray
    first: np.ndarray
    second: np.ndarray

    @staticmethod
    def empty(num_classes: int, embed_dim: int) -> Statistics:
        return Statistics(
            np.zeros(num_classes, np.int64),
            np.zeros((num_classes, embed_dim), np.int64),
            np.zeros((embed_dim, embed_dim), np.int64),
        )

    @staticmethod
    def of(features: Tensor | np.ndarray, labels: Tensor | np.ndarray, num_classes: int) -> Statistics:
        """The statistics of features [N, E] of norm 1 (any float dtype) with labels [N] in 0 … C − 1.

        Raises:
            DataError: a feature is not finite, or larger than 1, which features of norm 1 are not; or there are more
                than MOST_DIMENSIONS.
        """
        x = np.asarray(features, dtype=np.float64)
        if x.shape[1] > MOST_DIMENSIONS:
            raise DataError(
                f"the backbone's features have {x.shape[1]:,} dimensions, and at most {MOST_DIMENSIONS:,} are added up."
            )
        if not np.isfinite(x).all() or (x.size and np.abs(x).max() > 1 + 1e-3):
            raise DataError(
                "the frozen features of some images are not finite numbers of norm 1: the backbone's weights are "
                "damaged, or its precision cannot hold them; try backbone.precision=float32."
            )
        x = np.rint(np.clip(x, -1, 1) * GRID)
        of_class = np.eye(num_classes)[np.asarray(labels)]
        total = Statistics.empty(num_classes, x.shape[1])
        for start in range(0, len(x), EXACT_ROWS):
            rows, own = x[start : start + EXACT_ROWS], of_class[start : start + EXACT_ROWS]
            part = Statistics(
                own.sum(0).astype(np.int64), (own.T @ rows).astype(np.int64), (rows.T @ rows).astype(np.int64)
            )
            total = total.merge(part)
        return total

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both samples together.

        Raises:
            DataError: the classes or dimensions differ, or the sums would leave the range of 64 bits.
        """
        self._check_alike(other)
        for mine, theirs in ((self.second.diagonal(), other.second.diagonal()), (self.first, other.first)):
            if mine.size and np.abs(mine).max() >= LARGEST - int(np.abs(theirs).max()):
                raise DataError("a task has more images than its sums can count; divide it into several tasks.")
        return Statistics(self.counts + other.counts, self.first + other.first, self.second + other.second)

    def minus(self, other: Statistics) -> Statistics:
        """The statistics of this sample without another one that was part of it.

        Raises:
            DataError: the other sample has images that this one does not have.
        """
        self._check_alike(other)
        left = Statistics(self.counts - other.counts, self.first - other.first, self.second - other.second)
        if (left.counts < 0).any() or (left.second.diagonal() < 0).any():
            raise DataError("these images are not all among those of the task: nothing was taken out of it.")
        return left

    @staticmethod
    def merged(parts: Sequence[Statistics]) -> Statistics:
        """All parts together; their order does not matter."""
        return reduce(Statistics.merge, parts)

    def among(self, own: Sequence[str], names: Sequence[str]) -> Statistics:
        """The same sums with the classes `names` instead of `own`, found by name: classes that came later have no
        images yet, and one that is left out must have none.

        Raises:
            DataError: a class that is left out has images.
        """
        there = Statistics.empty(len(names), self.first.shape[1])
        for name, count, first in zip(own, self.counts, self.first, strict=True):
            if name in names:
                there.counts[names.index(name)], there.first[names.index(name)] = count, first
            elif count:
                raise DataError(f"class {name!r} is left out and still has {count} images.")
        return Statistics(there.counts, there.first, self.second)

    @property
    def count(self) -> int:
        """All classes have so many images together (N)."""
        return int(self.counts.sum())

    @cached_property
    def means(self) -> np.ndarray:
        """The mean feature of each class, float64 [C, E]; zeros for a class without images."""
        return self.first / (GRID * np.maximum(self.counts, 1)[:, None])

    @cached_property
    def moments(self) -> Moments:
        """Count, mean and scatter of all images of the task."""
        if not self.count:
            return Moments.empty(self.first.shape[1])
        mean = self.first.sum(0) / (GRID * self.count)
        scatter = self.second / GRID**2 - self.count * np.outer(mean, mean)
        return Moments(self.count, mean, scatter)

    @cached_property
    def scatter_within(self) -> np.ndarray:
        """[E, E]: S_w = Σ (x − μ_c)(x − μ_c)ᵀ, the scatter about the mean of each image's own class."""
        return self.second / GRID**2 - (self.means * self.counts[:, None]).T @ self.means

    def tensors(self) -> dict[str, np.ndarray]:
        """The sums as arrays of bytes, as few a number as hold them; the inverse is `from_tensors`."""
        packed = self.second[np.tril_indices(len(self.second))]
        return {"counts": self.counts, "first": _narrow(self.first), "second": _narrow(packed)}

    @staticmethod
    def from_tensors(tensors: dict[str, np.ndarray]) -> Statistics:
        """Raises CorruptError when the arrays are not those of statistics."""
        try:
            counts, first, packed = (tensors[name] for name in ("counts", "first", "second"))
            _, num_classes, e = first.shape
            # Before anything of these sizes is made.
            if not 0 < e <= MOST_DIMENSIONS or packed.shape[1:] != (e * (e + 1) // 2,):
                raise ValueError(f"sums of shapes {first.shape} and {packed.shape} do not fit each other")
            first, packed = _wide(first), _wide(packed)
            lower = np.zeros((e, e), np.int64)
            lower[np.tril_indices(e)] = packed
        except (KeyError, ValueError, IndexError) as error:
            raise CorruptError(f"these arrays are not the statistics of a task: {error}") from error
        if counts.dtype != np.int64 or counts.shape != (num_classes,) or (counts < 0).any():
            raise CorruptError("the counts of a task's statistics are not one number of images for each class.")
        return Statistics(counts, first, lower + np.tril(lower, -1).T)

    def _check_alike(self, other: Statistics) -> None:
        if self.first.shape != other.first.shape:
            raise DataError(
                f"statistics of {self.first.shape[0]} classes in {self.first.shape[1]} dimensions and of "
                f"{other.first.shape[0]} in {other.first.shape[1]} are of different tasks or backbones."
            )


def _narrow(values: np.ndarray) -> np.ndarray:
    """int64 [...] as uint8 [k, ...]: the k low bytes of each number in two's complement, low byte first."""
    largest = int(max(values.max(initial=0), -values.min(initial=0) - 1))
    num_bytes = largest.bit_length() // 8 + 1
    planes = np.moveaxis(np.ascontiguousarray(values, "<i8")[..., None].view(np.uint8), -1, 0)
    return np.ascontiguousarray(planes[:num_bytes])


def _wide(planes: np.ndarray) -> np.ndarray:
    """The inverse of `_narrow`."""
    if planes.dtype != np.uint8 or not 1 <= len(planes) <= 8:
        raise ValueError(f"{planes.dtype} planes of shape {planes.shape} hold no integers")
    values = np.empty(planes.shape[1:], "<i8")
    low_to_high = values[..., None].view(np.uint8)
    low_to_high[..., : len(planes)] = np.moveaxis(planes, 0, -1)
    low_to_high[..., len(planes) :] = np.where(planes[-1] >= 128, np.uint8(255), np.uint8(0))[..., None]
    return values.astype(np.int64, copy=False)
