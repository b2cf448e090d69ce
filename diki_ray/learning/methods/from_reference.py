"""Reference images of no task, which `zscl` and `snd` distil on, and their captions, which `zscl` reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diki_ray.clip.backbone import Backbone
from diki_ray.learning.methods.base import Step
from diki_ray.learning.methods.low_rank import LowRankMethod


class FromReference(LowRankMethod):
    reads_captions: ClassVar[bool] = True
    """Captions are not encoded otherwise."""
    reference: Callable[[], tuple[Tensor, Sequence[str]]]
    """Gives reference images [N, 3, H, W] and captions; set where the data are known, called before training only."""

    def __init__(self, backbone: Backbone, reference_batch: int, **low_rank: Any):
        super().__init__(backbone, **low_rank)
        self.reference_batch = reference_batch
        self._known: tuple[Tensor, Tensor, Tensor] | None = None

    def drawn(self, step: Step) -> tuple[Tensor, Tensor]:
        """Which reference images and captions the step distils on, the same for all its parts."""
        images, _, texts = self.learn_reference()
        generator = step.generator()
        chosen = torch.randperm(len(images), generator=generator)[: self.reference_batch]
        return chosen, torch.randperm(len(texts), generator=generator)[: self.reference_batch]

    @torch.no_grad()
    def learn_reference(self) -> tuple[Tensor, Tensor, Tensor]:
        """Reference images and the frozen features of images and captions; once, and not in the middle of a step."""
        if self._known is None:
            images, captions = self.reference()
            image_features = torch.cat([self.backbone.encode_image(part) for part in images.split(256)])
            text_features = torch.zeros(0, self.backbone.embed_dim)
            if self.reads_captions:
                tokens = self.backbone.tokenizer(list(captions))
                text_features = torch.cat([self.backbone.encode_text(part) for part in tokens.split(256)])
            self._known = images, image_features, text_features
        return self._known
