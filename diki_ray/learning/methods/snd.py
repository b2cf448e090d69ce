"""SND, select and distil: two teachers, weighted for each image (Yu et al., *Select and Distill: Selective Dual-Teacher
Knowledge Transfer for Continual Learning on Vision-Language Models*, ECCV 2024, arXiv 2403.09296; read with the
authors' code, chu0802/SnD).

For reference images of no task, g their features under training, g₀ those of the pre-trained model and g₁ those of the
model before this task:

    η = sigmoid(6 (‖g₀ − g₁‖ − 0.2))
    L = CE + 9 · mean η ‖g − g₁‖² + 0.5 · mean (1 − η) ‖g − g₀‖²

Where the earlier tasks moved an image's features far, it looks like one of theirs, and the model before is the teacher;
elsewhere the pre-trained one. The authors train all weights of the image tower of ViT-B/16 and freeze the text tower:
AdamW at lr 1e-5 with weight decay 5e-4, batches of 32, up to 1,000 steps a task, 64 images of ImageNet a step as the
reference.

Here otherwise: low-rank changes are trained, of the text tower, too, where nothing distils them (`text_depth: 0` leaves
it as it is); 32 reference images a step; the gate is each image's own, as the paper has it (in the code, whose gate is
a column and whose distances are a row, the means are multiplied).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods.base import Step
from diki_ray.learning.methods.from_reference import FromReference
from diki_ray.learning.methods.low_rank import keep, kept, trained

SLOPE = 6.0
THRESHOLD = 0.2


class Snd(FromReference):
    name = "snd"
    version = 1
    reads_captions = False
    summary = (
        "SND (Yu et al., ECCV 2024, arXiv 2403.09296) on low-rank changes of the projections: distilled from the "
        "pre-trained model and the one before while it learnt; the latest weights answer every image"
    )

    def __init__(self, backbone: Backbone, previous_weight: float, pretrained_weight: float, **others: Any):
        super().__init__(backbone, **others)
        self.previous_weight, self.pretrained_weight = previous_weight, pretrained_weight

    def initial(self, generator: torch.Generator, predecessor: Parameters | None = None) -> Parameters:
        self.learn_reference()
        start = super().initial(generator, predecessor)
        return start | keep("before", start)

    def extra_loss(self, parameters: Parameters, step: Step) -> Tensor:
        images, frozen, _ = self.learn_reference()
        chosen, _ = self.drawn(step)
        mine = chosen[step.share(len(chosen))]
        if not len(mine) and not self.backbone.in_lockstep:
            return torch.zeros((), device=self.backbone.device)
        features = self.image_features(images[mine], trained(parameters))
        with torch.no_grad():
            before = self.image_features(images[mine], kept("before", parameters))
        own = gate(frozen[mine], before)
        losses = self.previous_weight * own * (features - before).square().sum(1)
        losses = losses + self.pretrained_weight * (1 - own) * (features - frozen[mine]).square().sum(1)
        return step.mean(losses, len(chosen))

    def finish(self, parameters: Parameters, sums: Parameters) -> Parameters:
        return trained(parameters)


def gate(pretrained: Tensor, before: Tensor) -> Tensor:
    """η [b]: the share of the model before a task as a teacher, from features [b, E] under the pre-trained model and
    under it."""
    return torch.sigmoid(SLOPE * ((pretrained - before).norm(dim=1) - THRESHOLD))
