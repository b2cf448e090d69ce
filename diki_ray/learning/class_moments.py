"""Class counts and class means of a task's frozen features, kept beside its `Moments`.

What is kept are sums over images, so they merge over workers, batches and tasks, and an image can be taken back. A
feature is rounded to a multiple of 2⁻³⁰ before it is added (float32 itself resolves about 2⁻²⁸ of a unit vector's
entries). Such multiples add without rounding in float64 as long as a sum stays below 2²³, that is up to eight million
images a class: whatever the order and the grouping, the bits are the same, and a subtraction leaves the bits of never
having added.

Shapes: N features, E embedding dimensions, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from torch import Tensor

from diki_ray.errors import DataError
from diki_ray.learning.moments import Moments

GRID = 2.0**-30
"""Features are added as multiples of it."""


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """For each class of a task the number of its images, int64 [C], and the sum of their features, float64 [C, E]."""

    counts: np.ndarray
    sums: np.ndarray

    @staticmethod
    def empty(num_classes: int, embed_dim: int) -> ClassMoments:
        return ClassMoments(np.zeros(num_classes, np.int64), np.zeros((num_classes, embed_dim)))

    @staticmethod
    def of(features: Tensor | np.ndarray, labels: Tensor | np.ndarray, num_classes: int) -> ClassMoments:
        """Class moments of features [N, E] of any float dtype with labels [N] in 0 … C − 1.

        Raises:
            DataError: a feature that is not finite, or a label out of range.
        """
        x, y = np.asarray(features, dtype=np.float64), np.asarray(labels, dtype=np.int64)
        finite = np.isfinite(x).all(axis=1)
        if not finite.all():
            raise DataError(
                f"{np.count_nonzero(~finite)} of {len(x)} image features are not finite numbers, the first is number "
                f"{int(finite.argmin())}: look at that image, and whether the backbone overflows in its precision."
            )
        if len(y) and not 0 <= y.min() <= y.max() < num_classes:
            raise DataError(f"labels go from {y.min()} to {y.max()}, but the task has {num_classes} classes")
        rounded = np.rint(x / GRID) * GRID
        member = (np.arange(num_classes)[:, None] == y).astype(np.float64)
        return ClassMoments(member.sum(axis=1).astype(np.int64), member @ rounded)

    def merge(self, other: ClassMoments) -> ClassMoments:
        """Class moments of both samples together, exactly."""
        return ClassMoments(self.counts + other.counts, self.sums + other.sums)

    @staticmethod
    def merged(parts: Sequence[ClassMoments]) -> ClassMoments:
        """All parts together; any order and grouping of the same images gives the same bits."""
        return reduce(ClassMoments.merge, parts)

    def minus(self, other: ClassMoments) -> ClassMoments:
        """Class moments without a part that was added: the bits of never having added it.

        Raises:
            DataError: more images of a class taken back than there are.
        """
        counts = self.counts - other.counts
        if (counts < 0).any():
            c = int(counts.argmin())
            raise DataError(
                f"{other.counts[c]} images of class {c} cannot be taken back: the task has {self.counts[c]} of it"
            )
        return ClassMoments(counts, self.sums - other.sums)

    @property
    def means(self) -> np.ndarray:
        """float64 [C, E]; zero for a class without images."""
        return self.sums / np.maximum(self.counts, 1)[:, None]

    @property
    def seen(self) -> np.ndarray:
        """int64: the numbers of the classes that have images."""
        return np.flatnonzero(self.counts)

    def within_scatter(self, moments: Moments) -> np.ndarray:
        """S_w = S − Σ_c n_c (μ_c − m)(μ_c − m)ᵀ [E, E]: the scatter within the classes, given `moments` of the same
        images.

        Raises:
            DataError: the moments are of another number of images.
        """
        if moments.count != self.counts.sum():
            raise DataError(
                f"the class moments are of {self.counts.sum()} images and the moments of {moments.count}: they have to "
                "come from the same pass over the training images."
            )
        off_centre = (self.means - moments.mean)[self.seen]
        return moments.scatter - (off_centre * self.counts[self.seen, None]).T @ off_centre
