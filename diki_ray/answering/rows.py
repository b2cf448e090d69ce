"""Rows (image, module, weights): what decides the answer of a test image, computed once and kept.

An answer is decided by the image's feature under the module that answers it, at the integration weight that its route
gives it. A row has that feature, and for each data set whose classes were candidates the best of them.

Shapes: M rows, E embedding dimensions, C candidate classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diki_ray.answering.class_features import Candidates
from diki_ray.answering.predictor import Predictor
from diki_ray.answering.routing import Routes

ROWS_AT_ONCE = 4096
"""Logits of so many rows are in memory at a time."""
TOLERANCE = 1e-6
"""Weights that differ by less are one: another processor sums a density up in another order."""


class Wanted(NamedTuple):
    """Rows of one module: which images, and at which weights."""

    sample: np.ndarray  # int64 [M], place in the split
    weight: np.ndarray  # float64 [M]
    text_weight: np.ndarray  # float64 [M]

    def take(self, rows: np.ndarray) -> Wanted:
        return Wanted(self.sample[rows], self.weight[rows], self.text_weight[rows])


@dataclass(frozen=True, eq=False)
class BestClasses:
    """The best of some candidate classes for each row; NaN where it is not known."""

    best_logit: np.ndarray  # float32 [M]
    best_class: np.ndarray  # int32 [M], its place among the candidates
    log_sum: np.ndarray  # float32 [M], logsumexp over the candidates' logits: confidences follow from it
    error: float = 0.0
    """The largest error of the tabulated class features that were used."""
    ARRAYS: ClassVar = ("best_logit", "best_class", "log_sum")

    @staticmethod
    def of(logits: Tensor) -> BestClasses:
        """logits: [M, C]."""
        best = logits.max(1)
        return BestClasses(best.values.numpy(), best.indices.int().numpy(), logits.logsumexp(1).numpy())

    @staticmethod
    def unknown(num_rows: int) -> BestClasses:
        nan = np.full(num_rows, np.nan, np.float32)
        return BestClasses(nan, np.full(num_rows, -1, np.int32), nan.copy())

    @staticmethod
    def joined(parts: Sequence[BestClasses]) -> BestClasses:
        columns = {name: np.concatenate([vars(p)[name] for p in parts]) for name in BestClasses.ARRAYS}
        return BestClasses(**columns, error=max(p.error for p in parts))

    def take(self, rows: np.ndarray) -> BestClasses:
        return BestClasses(self.best_logit[rows], self.best_class[rows], self.log_sum[rows], self.error)

    def with_rows(self, rows: np.ndarray, found: BestClasses) -> BestClasses:
        """With what was found for some of the rows."""
        columns = {name: vars(self)[name].copy() for name in BestClasses.ARRAYS}
        for name, column in columns.items():
            column[rows] = vars(found)[name]
        return BestClasses(**columns, error=max(self.error, found.error))


@dataclass(frozen=True, eq=False)
class Rows:
    """What one module says of some images of a test set, ordered by image and weight."""

    wanted: Wanted
    feature: np.ndarray  # float32 [M, E]
    scores: Mapping[str, BestClasses] = field(default_factory=dict)
    """The key says which candidates there are (and how exact their class features are)."""

    def __len__(self) -> int:
        return len(self.wanted.sample)

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        order = np.lexsort([np.concatenate(c) for c in zip(*(p.wanted[::-1] for p in parts), strict=True)])
        keys = {key for p in parts for key in p.scores}
        scores = {
            k: BestClasses.joined([p.scores.get(k) or BestClasses.unknown(len(p)) for p in parts]) for k in sorted(keys)
        }
        wanted = Wanted(*(np.concatenate(c) for c in zip(*(p.wanted for p in parts), strict=True)))
        return Rows(wanted, np.concatenate([p.feature for p in parts]), scores).take(order)

    def take(self, rows: np.ndarray) -> Rows:
        return Rows(self.wanted.take(rows), self.feature[rows], {k: s.take(rows) for k, s in self.scores.items()})

    def find(self, wanted: Wanted, whatever_text: bool = False) -> np.ndarray:
        """int64 [M]: the rows of these images at these weights, −1 where there is none."""
        place = 2 * self.wanted.sample + self.wanted.weight  # weights are at most 1
        aim = 2 * wanted.sample + wanted.weight
        at, found = np.searchsorted(place, aim - TOLERANCE), np.full(len(aim), -1)
        left = np.arange(len(aim))
        while len(left := left[at[left] < len(place)]):
            left = left[place[at[left]] <= aim[left] + TOLERANCE]
            away = np.abs(self.wanted.text_weight[at[left]] - wanted.text_weight[left])
            hit = (away <= TOLERANCE) | whatever_text
            found[left[hit]] = at[left[hit]]
            left = left[~hit]
            at[left] += 1
        return found

    def without_other_weights(self, used: np.ndarray) -> Rows:
        """Without rows of images whose row at another weight is used instead: those of another calibration."""
        mask = np.zeros(len(self), bool)
        mask[used] = True
        return self.take(np.flatnonzero(mask | ~np.isin(self.wanted.sample, self.wanted.sample[mask])))


def computed_rows(
    predictor: Predictor, module: int, images: Tensor, sample: np.ndarray, wanted: Wanted, batch_size: int
) -> Rows:
    """Rows of a module by residual passes over images [B, 3, H, W], whose places in the split are `sample` [B]."""
    pairs, row = np.unique(np.stack([wanted.sample, wanted.weight]), axis=1, return_inverse=True)
    at = torch.from_numpy(np.searchsorted(sample, pairs[0])).to(images.device)
    passes = []
    for places, weight in zip(at.split(batch_size), torch.from_numpy(pairs[1]).split(batch_size), strict=True):
        routes = Routes(torch.full((len(places),), module), weight, weight)
        frozen = torch.zeros(len(places), predictor.backbone.embed_dim)
        passes.append(predictor.image_features(images[places], frozen, routes))
    return Rows(wanted, torch.cat(passes).numpy()[row.reshape(-1)])


def best_classes(
    predictor: Predictor, module: int, features: np.ndarray, text_weight: np.ndarray, candidates: Candidates
) -> BestClasses:
    """The best of some candidates for rows of a module (NO_TASK: the frozen model) with these features [M, E]."""
    parts = []
    chunks = (torch.from_numpy(a).split(ROWS_AT_ONCE) for a in (features, text_weight))
    for f, weight in zip(*chunks, strict=True):
        # Which rows are the frozen model's because of skip_weight is decided when routes are.
        routes = Routes(torch.full((len(f),), module), torch.ones_like(weight), weight)
        parts.append(BestClasses.of(predictor.logits_of_features(f, routes, candidates)))
    return BestClasses.joined(parts)
