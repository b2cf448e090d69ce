"""The small interface between a method and the platform: trainer, store and evaluator are written against it.

Shapes: B images, b a part's images, C texts or classes, L tokens, E embedding dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Parameters
from diki_ray.learning.collective import share
from diki_ray.learning.module import TaskModule

Answering = Literal["routed", "latest", "frozen", "joint", "classes"]
"""Which of the modules learnt answers an image (`Method.answering`)."""


@dataclass(frozen=True)
class Step:
    """One optimiser step of a task, the same on every rank and after a resumption."""

    number: int
    """From 0, over all epochs."""
    num_steps: int
    lr: float
    seed: int
    """It is the task's own."""
    num_samples: int = 0
    """Images of the global batch, over all parts; known in `after_step`."""
    part: int = 0
    num_parts: int = 1
    """Which of the step's parts is computed, and how many there are; a worker computes one or several."""
    shared: Tensor | None = field(default=None, compare=False)
    """`extra_loss` finds the rows of all parts' `shared_rows` here."""

    def generator(self) -> torch.Generator:
        """Random numbers of this step, equal on every rank: a function of the task's seed and the step alone, so that
        a resumed task draws what an undisturbed one drew."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.number) % 2**63)

    def share(self, num_rows: int) -> slice:
        """This part's rows of a batch that all parts drew alike."""
        return share(num_rows, self.part, self.num_parts)

    def mean(self, losses: Tensor, num_rows: int) -> Tensor:
        """From the losses of this part's rows what `Method.extra_loss` returns for their mean over all rows."""
        return losses.sum() / num_rows * self.num_parts


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """A batch of the task's training split, before or after the task is trained."""

    images: Tensor  # [b, 3, H, W]
    labels: Tensor  # [b]
    features: Tensor  # [b, E] frozen, normalised
    class_tokens: Tensor  # [C, L]
    seed: int = 0
    """The batch's own, whoever computes it."""

    def generator(self) -> torch.Generator:
        """Random numbers of this batch, the same whoever computes it and whenever."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True, eq=False)
class OwnImages:
    """A part's images in a step, under training."""

    images: Tensor  # [b, 3, H, W]
    labels: Tensor  # [b], on the features' device
    features: Tensor  # [b, E]
    texts: Tensor  # [C, E], of all the task's classes


def tensors_of(module: TaskModule) -> Parameters:
    """A module's parameters, by name: safetensors gives tensors in another order in each process, and optimiser states
    and gradients of all ranks are matched by it."""
    return {name: torch.from_numpy(np.array(p)) for name, p in sorted(module.parameters.items())}


class AddedLoss(Protocol):
    """A loss that is added to a step's, as `Method` describes these two."""

    def shared_rows(self, parameters: Parameters, step: Step) -> tuple[Tensor, int] | None: ...

    def extra_loss(self, parameters: Parameters, step: Step) -> Tensor | None: ...


class Method(ABC):
    """How a task is learnt and how an image is answered, on one backbone.

    A subclass gives the tensors of a task and the features under them, and says what its modules depend on; everything
    below `text_features` has a default. Parameters are float32 on the CPU where they are made, on the backbone's
    device where they are used.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    """Part of the module key: raise it when the same inputs would train another module."""
    summary: ClassVar[str] = ""
    """What it is, and its paper, in a phrase for people."""
    sequential: ClassVar[bool] = False
    """True: a task starts from its predecessor's parameters, and its module key includes the predecessor's key."""
    looks_first: ClassVar[bool] = False
    """True: before the first step the training images are gone through once, for `first_sums` and `begin`."""
    answering: ClassVar[Answering] = "routed"
    """Which modules answer an image: `routed` (that of the densest Gaussian, at its weight), `latest` (the one learnt
    last, at w = 1), `frozen` (none), `joint` (all learnt, by `joint_logits`), `classes` (the class model alone)."""

    replay: AddedLoss | None = None
    """The loss of exemplars of earlier tasks, beside the method's own; set before a task is trained."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    @classmethod
    def described(cls, settings: Mapping[str, Any]) -> str:
        """The summary under a configuration's settings of the method."""
        return cls.summary or cls.name

    @abstractmethod
    def initial(self, generator: torch.Generator, predecessor: Parameters | None = None) -> Parameters:
        """The tensors of a task before training; none at all: nothing is trained."""

    def starting(
        self, generator: torch.Generator, class_names: Sequence[str], predecessor: TaskModule | None
    ) -> Parameters:
        """The same for a task of these classes, after the predecessor's module; a method that keeps something of each
        class says it here."""
        return self.initial(generator, None if predecessor is None else tensors_of(predecessor))

    @abstractmethod
    def image_features(self, images: Tensor, parameters: Parameters, weight: float | Tensor = 1.0) -> Tensor:
        """Normalised features [B, E] of images [B, 3, H, W] under the parameters (shared, or with a leading batch
        dimension: each image its own) at the weight (scalar or [B])."""

    @abstractmethod
    def text_features(self, tokens: Tensor, parameters: Parameters, weight: float | Tensor = 1.0) -> Tensor:
        """Normalised features [C, E] of tokens [C, L], likewise."""

    def first_sums(self, parameters: Parameters, batch: TrainingBatch) -> Parameters:
        """Before a task is trained (`looks_first`): tensors to be summed over its training batches and all ranks, in
        float64."""
        return {}

    def begin(self, parameters: Parameters, sums: Parameters, class_tokens: Tensor) -> Parameters:
        """The tensors that training starts from, of the names and shapes of the initial ones, from these, the
        `first_sums` and the classes' tokens [C, L]."""
        return parameters

    @staticmethod
    def is_trained(name: str) -> bool:
        """Whether the tensor of that name gets gradients; the others are kept with the module and in checkpoints (old
        slices, Fisher information, variances)."""
        return True

    def effective(self, parameters: Parameters, step: Step | None = None) -> Parameters:
        """The parameters that features are computed under, if others than those that are trained: a draw around them
        in a training step, their average over steps or an interpolation elsewhere (step None)."""
        return parameters

    def logits(self, features: Tensor, texts: Tensor, parameters: Parameters) -> Tensor:
        """What a task is trained and validated by: logits [b, C] of features [b, E] among its classes' text features
        [C, E], all under the effective parameters."""
        return self.backbone.logits(features, texts)

    def image_losses(self, own: OwnImages, parameters: Parameters, step: Step) -> Tensor | None:
        """Added to the cross entropy of each of a part's images: losses [b], with gradients to the features, the texts
        and the parameters."""
        return None

    def extra_loss(self, parameters: Parameters, step: Step) -> Tensor | None:
        """Added to the mean cross entropy of a step: the mean over parts of what is returned for each. A penalty is the
        same for all; over rows that parts share use `step.share` and `step.mean`, or, where a loss needs the features
        of all rows at once, `shared_rows`."""
        return None

    def shared_rows(self, parameters: Parameters, step: Step) -> tuple[Tensor, int] | None:
        """Features of this part's rows (`step.share`) [r, E] of a batch that all parts drew alike, and its number of
        rows R. `extra_loss` finds all of them, [R, E] in order, in `step.shared`, with gradients back to here."""
        return None

    def after_step(self, parameters: Parameters, gradients: Parameters, step: Step) -> None:
        """Changes tensors in place after an optimiser step, on every rank alike; gradients are those of all ranks."""
        return None

    def sums(self, parameters: Parameters, batch: TrainingBatch) -> Parameters:
        """Once a task is trained: tensors to be summed over its training batches and all ranks, in float64."""
        return {}

    def finish(self, parameters: Parameters, sums: Parameters) -> Parameters:
        """What the module holds, from the trained parameters and the sums."""
        return parameters | sums

    def join(self, modules: Sequence[TaskModule]) -> Any:
        """`joint` only: what these modules know together; kept as long as the same modules are learnt."""
        raise NotImplementedError(f"{self.name} does not answer jointly")

    def joint_logits(self, joined: Any, features: Tensor, zero_shot: Tensor, names: Sequence[str]) -> Tensor:
        """`joint` only: logits [B, C] among candidate classes `names` from frozen features [B, E] and zero-shot logits
        [B, C], on the CPU."""
        raise NotImplementedError(f"{self.name} does not answer jointly")


class UntrainedMethod(Method):
    """Nothing is trained, and features are the frozen model's."""

    def initial(self, generator: torch.Generator, predecessor: Parameters | None = None) -> Parameters:
        return {}

    def image_features(self, images: Tensor, parameters: Parameters, weight: float | Tensor = 1.0) -> Tensor:
        return self.backbone.encode_image(images)

    def text_features(self, tokens: Tensor, parameters: Parameters, weight: float | Tensor = 1.0) -> Tensor:
        return self.backbone.encode_text(tokens)

    @staticmethod
    def is_trained(name: str) -> bool:
        return False
