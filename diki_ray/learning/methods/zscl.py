"""ZSCL: distillation from the pre-trained model on data of no task (Zheng et al., ICCV 2023, arXiv 2303.06628).

    L = CE + L_image + L_text + λ ‖θ − θ*‖²

For reference images and texts, s = logits of the images under training among texts under the pre-trained model, and t =
the same with both under the pre-trained model (as in the authors' code: only the image tower gets a gradient from it):

    L_image = T² CE(softmax(t/T), s/T), a distribution over texts for each image; L_text the same of sᵀ and tᵀ.

θ* are the weights at the start of the task (`squared_distance`: of the weights, whose low-rank change is trained here
instead of all weights). Every `average_every` steps the average of the weights since the start of the task is updated;
the average answers, and the next task starts from it. Here the factors are averaged, not their products.

The authors' script for ViT-B/16: all weights trained by AdamW at lr 1e-5 (5e-5 for two sets), batch 64, 1,000 steps a
task, T = 2, λ = 1, an average every 100 steps, ImageNet's images and Conceptual Captions' texts as the reference. Its
label smoothing of 0.2 and its warm-up of 100 steps are left out: cross entropy and schedule are the platform's.
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


class Zscl(FromReference):
    name = "zscl"
    version = 1
    summary = (
        "ZSCL (Zheng et al., ICCV 2023, arXiv 2303.06628) on low-rank changes of the projections: distilled from the "
        "pre-trained model while it learnt; the average of the weights answers every image"
    )

    def __init__(
        self,
        backbone: Backbone,
        temperature: float,
        weight_consolidation: float,
        average_every: int,
        **others: Any,
    ):
        super().__init__(backbone, **others)
        self.temperature, self.weight_consolidation = temperature, weight_consolidation
        self.average_every = average_every

    def initial(self, generator: torch.Generator, predecessor: Parameters | None = None) -> Parameters:
        self.learn_reference()
        start = super().initial(generator, predecessor)
        return start | keep("anchor", start) | keep("average", start)

    def effective(self, parameters: Parameters, step: Step | None = None) -> Parameters:
        average = kept("average", parameters)  # none in a module: it holds the average itself
        return average if step is None and average else trained(parameters)

    def shared_rows(self, parameters: Parameters, step: Step) -> tuple[Tensor, int]:
        """Features of this part's reference images."""
        images, *_ = self.learn_reference()
        chosen, _ = self.drawn(step)
        mine = chosen[step.share(len(chosen))]
        if len(mine) or self.backbone.in_lockstep:
            return self.image_features(images[mine], trained(parameters)), len(chosen)
        return torch.zeros(0, self.backbone.embed_dim, device=self.backbone.device), len(chosen)

    def extra_loss(self, parameters: Parameters, step: Step) -> Tensor:
        _, frozen_images, frozen_texts = self.learn_reference()
        chosen, captions = self.drawn(step)
        factors, texts = trained(parameters), frozen_texts[captions]
        assert step.shared is not None, "the platform gives the features that shared_rows returned"
        logits = self.backbone.logits(step.shared, texts)
        target = self.backbone.logits(frozen_images[chosen], texts)
        distilled = self._distillation(logits, target) + self._distillation(logits.T, target.T)
        return distilled + self.weight_consolidation * self.squared_distance(factors, kept("anchor", parameters))

    def _distillation(self, logits: Tensor, target: Tensor) -> Tensor:
        t = self.temperature
        return t**2 * torch.nn.functional.cross_entropy(logits / t, (target / t).softmax(1))

    def after_step(self, parameters: Parameters, gradients: Parameters, step: Step) -> None:
        if step.number % self.average_every == 0:
            num_averaged = step.number // self.average_every + 1  # and the start
            for name, average in kept("average", parameters).items():
                average.lerp_(parameters[name], 1 / (num_averaged + 1))

    def finish(self, parameters: Parameters, sums: Parameters) -> Parameters:
        return kept("average", parameters)
