"""An exemplar memory: a few images of each learnt task, kept to be trained on again beside later ones.

The budget, the quotas and the scores follow "Online federated continual learning with uncertainty-aware memory" (ICLR
2025): quotas are equal over the classes seen, and what a class cannot use is shared out; of a task's images those are
kept whose answers differ least (or most) under transforms of the image; what is kept of earlier tasks is only ever
truncated, never scored again. How many are kept, and which, is a function of what is stored, so that a run that was
killed finds the same memory.

Shapes: K transforms, B images, C classes, n exemplars.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Score = Literal["bregman", "confidence", "margin", "entropy", "random", "reservoir"]
Choice = Literal["bottom", "top", "step"]

NUM_TRANSFORMS = 12
CROP = 7 / 8
"""Side of the crops of `transforms`, as a share of the image's."""
MOST_EXEMPLARS = 100_000
"""A stored task has at most so many; no budget is larger."""


@dataclass(frozen=True, eq=False)
class Exemplars:
    """What is kept of one task, in any order.

    images: encoded files; labels: int64 [n] among the task's classes; scores: float64 [n].
    """

    images: tuple[bytes, ...]
    labels: np.ndarray
    scores: np.ndarray

    def chosen(self, places: Sequence[int]) -> Exemplars:
        """Returns those at these places, in this order."""
        return Exemplars(tuple(self.images[p] for p in places), self.labels[list(places)], self.scores[list(places)])

    @property
    def num_bytes(self) -> int:
        """The encoded images have so many bytes together."""
        return sum(map(len, self.images))

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns the arrays of a module's file; the inverse is `from_tensors`."""
        return {
            "images": np.frombuffer(b"".join(self.images), np.uint8),
            "lengths": np.array([len(image) for image in self.images], np.int64),
            "labels": self.labels.astype(np.int64),
            "scores": self.scores.astype(np.float64),
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, np.ndarray], num_classes: int) -> Exemplars:
        """Raises ValueError or KeyError when the arrays are not those of exemplars of so many classes."""
        images, lengths, labels, scores = (tensors[name] for name in ("images", "lengths", "labels", "scores"))
        types = (images.dtype, lengths.dtype, labels.dtype, scores.dtype)
        if types != (np.uint8, np.int64, np.int64, np.float64) or any(a.ndim != 1 for a in tensors.values()):
            raise ValueError(f"exemplars of types {', '.join(map(str, types))} are none")
        if not len(lengths) == len(labels) == len(scores) <= MOST_EXEMPLARS:
            raise ValueError(f"exemplars have {len(lengths)} lengths, {len(labels)} labels and {len(scores)} scores")
        if (lengths < 1).any() or (lengths > len(images)).any() or lengths.sum() != len(images):
            raise ValueError("the lengths of exemplars are not those of their bytes")
        if (labels < 0).any() or (labels >= num_classes).any() or not np.isfinite(scores).all():
            raise ValueError("exemplars have labels or scores that no task gives")
        ends = np.cumsum(lengths).tolist()
        data = images.tobytes()
        files = tuple(data[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True))
        return Exemplars(files, labels, scores)


@dataclass(frozen=True)
class Budget:
    """How much is kept of all tasks together, and by which rule."""

    num_images: int
    max_bytes: int
    """The encoded images may have so many bytes together."""
    score: Score = "bregman"
    choice: Choice = "bottom"
    """bottom: the lowest scores; top: the highest; step: from the lowest to the highest in equal steps."""

    def kept(self, stored: Sequence[Exemplars], new: Exemplars | None = None) -> list[list[int]]:
        """The places of what is kept of each stored task, which is only cut short, and at last of a new one, from which
        is chosen: as many images as both limits allow."""
        tasks = list(stored) if new is None else [*stored, new]
        choices = [_CUT_SHORT[self.choice]] * len(stored) + [self.choice]
        fitting, too_many = 0, min(self.num_images, sum(len(task.images) for task in tasks)) + 1
        while too_many - fitting > 1:  # more images have more bytes, or, chosen in steps, about as many
            middle = (fitting + too_many) // 2
            places = self._kept(tasks, choices, middle)
            num_bytes = sum(len(task.images[p]) for task, of_task in zip(tasks, places, strict=True) for p in of_task)
            fitting, too_many = (middle, too_many) if num_bytes <= self.max_bytes else (fitting, middle)
        return self._kept(tasks, choices, fitting)

    def _kept(self, tasks: Sequence[Exemplars], choices: Sequence[Choice], num_images: int) -> list[list[int]]:
        groups = [(t, group) for t, task in enumerate(tasks) for group in self.groups(task.labels, task.scores)]
        found: list[list[int]] = [[] for _ in tasks]
        if self.score == "reservoir":
            drawn = sorted((tasks[t].scores[p], t, p) for t, group in groups for p in group)
            for _, t, place in drawn[:num_images]:
                found[t].append(place)
            return [sorted(places) for places in found]
        for (t, group), quota in zip(groups, quotas([len(g) for _, g in groups], num_images), strict=True):
            found[t] += [group[p] for p in picked(len(group), quota, choices[t])]
        return found

    def groups(self, labels: np.ndarray, scores: np.ndarray) -> list[list[int]]:
        """The places of each class that has any, by ascending scores; of a reservoir, which knows no classes, all."""
        order = np.lexsort((np.arange(len(scores)), scores))
        if self.score == "reservoir":
            return [order.tolist()]
        return [order[labels[order] == label].tolist() for label in np.unique(labels)]


_CUT_SHORT: dict[Choice, Choice] = {"bottom": "bottom", "top": "top", "step": "bottom"}
"""What stays of images that were chosen before: steps are not taken again, or images would come back."""


def quotas(available: Sequence[int], budget: int) -> list[int]:
    """How many each class keeps: equal shares, and what one cannot use is shared out among the others. What does not
    divide goes to the first."""
    given = [0] * len(available)
    left = min(budget, sum(available))
    while left:
        unfilled = [c for c, number in enumerate(available) if given[c] < number]
        share = max(1, left // len(unfilled))
        for c in unfilled:
            more = min(share, available[c] - given[c], left)
            given[c] += more
            left -= more
    return given


def picked(number: int, quota: int, choice: Choice) -> list[int]:
    """Which `quota` of `number` things in ascending order."""
    if choice == "step":
        return [place * number // quota for place in range(quota)]
    return list(range(quota) if choice == "bottom" else range(number - quota, number))


def bregman_information(logits: Tensor) -> Tensor:
    """mean_k LSE(z_k) − LSE(mean_k z_k), float64 [B] of logits [K, B, C]: the part of the expected log loss that comes
    of answers that differ (Gruber and Buettner, AISTATS 2023); 0 where all K agree."""
    z = logits.double()
    return z.logsumexp(-1).mean(0) - z.mean(0).logsumexp(-1)


def scores(kind: Score, logits: Tensor) -> Tensor:
    """float64 [B] of logits [K, B, C], the first of which are those of the image as it is; the less certain the answer,
    the higher: Bregman information over all K, else of the first 1 less the largest probability, 1 less its distance
    to the second, or the entropy."""
    if kind == "bregman":
        return bregman_information(logits)
    probabilities = logits[0].double().softmax(-1)
    best = probabilities.topk(min(2, probabilities.shape[-1]), -1).values
    if kind == "confidence":
        return 1 - best[:, 0]
    if kind == "margin":
        return 1 - best[:, 0] + (best[:, 1] if best.shape[1] > 1 else 0)
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


def transforms(images: Tensor) -> Iterator[Tensor]:
    """Images [B, 3, H, W] as they are, then in eleven ways that leave most of them visible: whole, or one of five crops
    at their size, each also mirrored."""
    height, width = images.shape[-2:]
    h, w = max(1, round(CROP * height)), max(1, round(CROP * width))
    centre = ((height - h) // 2, (width - w) // 2)
    for mirrored in (images, images.flip(-1)):
        yield mirrored
        for top, left in (centre, (0, 0), (0, width - w), (height - h, 0), (height - h, width - w)):
            crop = mirrored[..., top : top + h, left : left + w]
            yield F.interpolate(crop, (height, width), mode="bilinear", align_corners=False) if len(crop) else mirrored
