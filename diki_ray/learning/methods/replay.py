"""Replay: beside each batch of a task a batch of exemplars of earlier ones, whose loss is added.

    L = CE(batch) + λ CE(exemplars of the step, each among the classes that are in their batch)

Exemplars and classes are rows that the parts of a step share (`Method.shared_rows`), so that any number of workers gets
the same bits.

Shapes: n exemplars, of C classes, b of them in a step, of c classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods.base import Method, Step

Rows = tuple[int, Callable[[slice], Tensor]]
"""A number of rows, and what gives the features of some of them."""

_OWN_STREAM = 0x5EED
"""Keeps the exemplars drawn in a step apart from what else is drawn in it."""


@dataclass(frozen=True, eq=False)
class Replay:
    """The exemplars of the tasks before.

    images: [n, 3, H, W] on the CPU; classes: int64 [n]; class_tokens: [C, L]; batch_size: b; weight: λ.
    """

    images: Tensor
    classes: Tensor
    class_tokens: Tensor
    batch_size: int
    weight: float

    def rows(self, method: Method, parameters: Parameters, step: Step) -> list[Rows]:
        """The step's exemplars, then the classes they are of."""
        chosen, classes, _ = self._drawn(step)
        images, tokens = self.images[chosen], self.class_tokens[classes]
        return [
            (len(images), lambda own: method.image_features(images[own].to(method.backbone.device), parameters)),
            (len(tokens), lambda own: method.text_features(tokens[own], parameters)),
        ]

    def loss(self, method: Method, rows: Tensor, step: Step) -> Tensor:
        """λ times the mean cross entropy, from the features [b + c, E] of all `rows`."""
        chosen, _, labels = self._drawn(step)
        logits = method.backbone.logits(rows[: len(chosen)], rows[len(chosen) :])
        return self.weight * F.cross_entropy(logits, labels.to(logits.device))

    def _drawn(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Which exemplars, which classes these are of, and the place of each one's there; the same for all parts."""
        seed = int(torch.randint(2**62, (1,), generator=step.generator())) ^ _OWN_STREAM
        chosen = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))[: self.batch_size]
        classes, labels = self.classes[chosen].unique(return_inverse=True)
        return chosen, classes, labels


def share_of(method: Method, step: Step, kinds: Sequence[Rows]) -> tuple[Tensor, int] | None:
    """What `Method.shared_rows` returns for rows of several kinds, one kind behind the other; None for none."""
    if not kinds:
        return None
    share, first, found = step.share(sum(number for number, _ in kinds)), 0, []
    for number, features in kinds:
        own = slice(max(share.start - first, 0), max(min(share.stop - first, number), 0))
        if own.start < own.stop or method.backbone.in_lockstep:
            found.append(features(own))
        first += number
    if not found:
        found.append(torch.zeros(0, method.backbone.embed_dim, device=method.backbone.device))
    return torch.cat(found), first
