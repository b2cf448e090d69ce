"""Replay: beside each batch of a task a batch of exemplars of earlier ones, whose loss is added.

    L = CE(batch) + λ CE(exemplars of the step, each among the classes that are in their batch)

Exemplars and classes are rows that the parts of a step share (`Method.shared_rows`), so that any number of workers gets
the same bits.

Shapes: n exemplars, of C classes, b of them in a step, of c classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods.base import AddedLoss, Method, Step

_OWN_STREAM = 0x5EED
"""Keeps the exemplars drawn in a step apart from what else is drawn in it."""


@dataclass(frozen=True, eq=False)
class Replay(AddedLoss):
    """The exemplars of the tasks before.

    images: [n, 3, H, W] on the CPU; classes: int64 [n]; class_tokens: [C, L]; batch_size: b; weight: λ.
    """

    method: Method
    images: Tensor
    classes: Tensor
    class_tokens: Tensor
    batch_size: int
    weight: float

    def shared_rows(self, parameters: Parameters, step: Step) -> tuple[Tensor, int]:
        """This part's rows of b + c: features of the step's exemplars, then of the classes that they are of."""
        chosen, classes, _ = self._drawn(step)
        own = step.share(len(chosen) + len(classes))
        first = len(chosen)
        images = self.images[chosen[own]]
        tokens = self.class_tokens[classes[max(own.start - first, 0) : max(own.stop - first, 0)]]
        backbone, effective = self.method.backbone, self.method.effective(parameters, step)
        rows = [torch.zeros(0, backbone.embed_dim, device=backbone.device)]
        if len(images) or backbone.in_lockstep:
            rows.append(self.method.image_features(images.to(backbone.device), effective))
        if len(tokens) or backbone.in_lockstep:
            rows.append(self.method.text_features(tokens, effective))
        return torch.cat(rows), len(chosen) + len(classes)

    def extra_loss(self, parameters: Parameters, step: Step) -> Tensor:
        """λ times the mean cross entropy of the exemplars."""
        chosen, _, labels = self._drawn(step)
        assert step.shared is not None, "the platform gives the features that shared_rows returned"
        images, texts = step.shared[: len(chosen)], step.shared[len(chosen) :]
        logits = self.method.backbone.logits(images, texts)
        return self.weight * F.cross_entropy(logits, labels.to(logits.device))

    def _drawn(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Which exemplars, which classes these are of, and the place of each one's there; the same for all parts."""
        seed = int(torch.randint(2**62, (1,), generator=step.generator())) ^ _OWN_STREAM
        chosen = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))[: self.batch_size]
        classes, labels = self.classes[chosen].unique(return_inverse=True)
        return chosen, classes, labels
