"""Nothing is trained: the frozen CLIP answers (Radford et al., ICML 2021, arXiv 2103.00020). No hyperparameters.

Its row is what every other method is to be read against; its modules hold the statistics of the tasks alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods.base import Method


class ZeroShot(Method):
    name = "zero_shot"
    version = 1
    summary = (
        "zero-shot classification (Radford et al., ICML 2021, arXiv 2103.00020): nothing is trained, the pre-trained "
        "model answers"
    )
    answering = "frozen"

    def initial(self, generator: torch.Generator, predecessor: Parameters | None = None) -> Parameters:
        return {}

    def image_features(self, images: Tensor, parameters: Parameters, weight: float | Tensor = 1.0) -> Tensor:
        return self.backbone.encode_image(images)

    def text_features(self, tokens: Tensor, parameters: Parameters, weight: float | Tensor = 1.0) -> Tensor:
        return self.backbone.encode_text(tokens)
