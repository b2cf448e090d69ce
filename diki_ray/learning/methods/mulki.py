"""After MulKI, multi-stage knowledge integration (Zhang et al., *Multi-Stage Knowledge Integration of Vision-Language
Models for Continual Learning*, 2024, arXiv 2411.06764).

**The formulas are ours.** The paper's text could not be read and no code is public; its abstract says what they are
made of: distillation without reference data; features of both modalities aligned through prototypes of the classes;
relations to the prototypes, within and between modalities, kept; two frozen teachers, the pre-trained model and the one
before the task, weighted for each sample; models integrated within a task and between tasks. Here, for an image x of a
class y with features g under training, class texts t_c, logit scale s:

    p_c     the mean of the frozen features of class c's training images, at norm 1
    align   = CE(s g · p, y) + mean_c CE(s t_c · p, c)
    r(g)    = softmax(s g · p / T),   q(g) = softmax(s g · t / T)      relations within and between the modalities
    keep    = T² Σ_k α_k ( KL(r(g_k) ‖ r(g)) + KL(q_k(g_k) ‖ q(g)) )   over teachers k = 0, 1; q_k: with their texts
    α₁      = sigmoid(6 (‖g₀ − g₁‖ − 0.2)),   α₀ = 1 − α₁              SND's gate (snd.py), on the task's own images
    L       = CE + alignment · align + distillation · mean keep

Within a task the factors are averaged, θ̄ ← d θ̄ + (1 − d) θ after each step; between tasks θ₁ + a (θ̄ − θ₁) answers and
goes on, θ₁ the factors before the task. The paper trains all weights and reports MTIL-I Transfer 70.1, Average 77.3 for
ViT-B/16; nothing of it was run here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods.base import OwnImages, Step, TrainingBatch
from diki_ray.learning.methods.low_rank import LowRankMethod, keep, kept, trained
from diki_ray.learning.methods.snd import gate
from diki_ray.learning.module import TaskModule

TEMPERATURE = 2.0
"""T, as ZSCL has it."""
PROTOTYPES, FROZEN_TEXTS, TEXTS_BEFORE = "class/prototypes", "class/frozen_texts", "class/texts_before"


class Mulki(LowRankMethod):
    """Kept beside the factors while they are trained: `before`, `average`, and features by class [C, E]."""

    name = "mulki"
    version = 1
    summary = (
        "after the description of MulKI (Zhang et al., 2024, arXiv 2411.06764), with formulas of this platform's own: "
        "distilled from the pre-trained model and the one before on the task's images; the integrated weights answer"
    )
    looks_first = True

    def __init__(
        self,
        backbone: Backbone,
        alignment: float,
        distillation: float,
        average_decay: float,
        interpolation: float,
        **low_rank: Any,
    ):
        super().__init__(backbone, **low_rank)
        self.alignment, self.distillation = alignment, distillation
        self.average_decay, self.interpolation = average_decay, interpolation

    def starting(
        self, generator: torch.Generator, class_names: Sequence[str], predecessor: TaskModule | None
    ) -> Parameters:
        start = super().starting(generator, class_names, predecessor)
        by_class = torch.zeros(len(class_names), self.backbone.embed_dim)
        classes = dict.fromkeys((PROTOTYPES, FROZEN_TEXTS, TEXTS_BEFORE), by_class)
        return start | keep("before", start) | keep("average", start) | classes

    def first_sums(self, parameters: Parameters, batch: TrainingBatch) -> Parameters:
        labels = F.one_hot(batch.labels.cpu(), len(batch.class_tokens)).double()
        return {PROTOTYPES: labels.T @ batch.features.cpu().double()}

    def begin(self, parameters: Parameters, sums: Parameters, class_tokens: Tensor) -> Parameters:
        return parameters | {
            PROTOTYPES: F.normalize(sums[PROTOTYPES], dim=1).float(),
            FROZEN_TEXTS: self.backbone.encode_text(class_tokens),
            TEXTS_BEFORE: self.text_features(class_tokens, kept("before", parameters)),
        }

    def effective(self, parameters: Parameters, step: Step | None = None) -> Parameters:
        average = kept("average", parameters)  # none in a module: it holds the integrated factors
        if step is not None or not average:
            return trained(parameters)
        return {n: p.lerp(average[n], self.interpolation) for n, p in kept("before", parameters).items()}

    def image_losses(self, own: OwnImages, parameters: Parameters, step: Step) -> Tensor:
        with torch.no_grad():
            frozen = self.backbone.encode_image(own.images)
            before = self.image_features(own.images, kept("before", parameters))
        logits, prototypes = self.backbone.logits, parameters[PROTOTYPES]
        classes = torch.arange(len(prototypes), device=prototypes.device)
        aligned = F.cross_entropy(logits(own.features, prototypes), own.labels, reduction="none")
        aligned = aligned + F.cross_entropy(logits(own.texts, prototypes), classes)
        share = gate(frozen, before)
        kept_apart = [
            weight * _divergence(logits(teacher, of_teacher), logits(own.features, of_student))
            for weight, teacher, texts in (
                (1 - share, frozen, parameters[FROZEN_TEXTS]),
                (share, before, parameters[TEXTS_BEFORE]),
            )
            for of_teacher, of_student in ((prototypes, prototypes), (texts, own.texts))
        ]
        return self.alignment * aligned + self.distillation * torch.stack(kept_apart).sum(0)

    def after_step(self, parameters: Parameters, gradients: Parameters, step: Step) -> None:
        for name, average in kept("average", parameters).items():
            average.lerp_(parameters[name], 1 - self.average_decay)

    def finish(self, parameters: Parameters, sums: Parameters) -> Parameters:
        return self.effective(parameters)


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """T² KL(softmax(teacher / T) ‖ softmax(student / T)) of logits [b, C]: [b]."""
    t = TEMPERATURE
    target = (teacher.detach() / t).log_softmax(1)
    return t**2 * F.kl_div((student / t).log_softmax(1), target, log_target=True, reduction="none").sum(1)
