"""The small interface between a method and the platform: trainer, store and evaluator are written against it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from diki_ray.model.backbone import Backbone
from diki_ray.model.residual import Parameters


class Method(ABC):
    """How a task is learnt and how an image is answered, on one backbone.

    A subclass gives the trainable tensors, the features under them, and says what its modules depend on.
    Shapes: B images, C texts, E embedding dimensions.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    """Part of the module key: raise it when the same inputs would train another module."""
    sequential: ClassVar[bool] = False
    """True: a task starts from its predecessor's parameters, and its module key includes the predecessor's key."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    @abstractmethod
    def initial(self, generator: torch.Generator, predecessor: Parameters | None = None) -> Parameters:
        """The tensors to train, before training; float32, on the CPU."""

    @abstractmethod
    def image_features(self, images: Tensor, parameters: Parameters, weight: float | Tensor = 1.0) -> Tensor:
        """Normalised features [B, E] of images [B, 3, H, W] under the parameters (shared, or with a leading batch
        dimension: each image its own) at the weight (scalar or [B])."""

    @abstractmethod
    def text_features(self, tokens: Tensor, parameters: Parameters, weight: float | Tensor = 1.0) -> Tensor:
        """Normalised features [C, E] of tokens [C, L], likewise."""

    def penalty(self, parameters: Parameters) -> Tensor | None:
        """Added once to each step's loss (a regulariser); None for none."""
        return None
