"""From log densities to a task and an integration weight (method.md, "Inference").

Shapes: N images, T tasks learnt so far. Densities are log N(f; μ_t, Σ_t), float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from diki_ray.answering.gaussians import Gaussians
from diki_ray.learning.methods.base import Answering

Routing = Literal["image", "batch"]
NO_TASK = -1
"""The route of an image when nothing is learnt, or when its weight is below `skip_weight`: the frozen model answers."""


class Calibration(Protocol):
    """How much of a task's module to let in, given the log density of its own Gaussian."""

    def weight(self, log_density: Tensor, task: Tensor) -> Tensor:
        """Integration weights in [0, 1] [N] for the log densities [N] of the tasks [N] (indices)."""
        ...


@dataclass(frozen=True)
class Published:
    """w = sigmoid(s / scale + bias). Published: scale 512 (the embedding dimension of ViT-B/16), bias −1."""

    scale: float
    bias: float = -1.0

    def weight(self, log_density: Tensor, task: Tensor) -> Tensor:
        return torch.sigmoid(log_density / self.scale + self.bias)


@dataclass(frozen=True, eq=False)
class Validated:
    """w = sigmoid(slope · (s − location_t) / spread_t + bias): location and spread are the mean and the standard
    deviation of task t's log density over its own validation images, so a weight means the same on every backbone
    and at every number of shots."""

    location: Tensor  # [T]
    spread: Tensor  # [T]
    slope: float = 1.0
    bias: float = 4.0

    @staticmethod
    def from_validation(
        gaussians: Gaussians, validation_features: Sequence[Tensor], slope: float = 1.0, bias: float = 4.0
    ) -> Validated:
        """validation_features: for each task, frozen features [M_t, E] of at least 2 of its validation images.

        Raises:
            ValueError: a task with fewer than two of them.
        """
        own = []
        for task, features in enumerate(validation_features):
            if len(features) < 2:
                raise ValueError(
                    f"calibration `validated` needs at least 2 validation images of each task; task {task} has "
                    f"{len(features)}. Give it a validation split or use calibration.form=published."
                )
            own.append(gaussians.log_density_of(torch.full((len(features),), task), features))
        location = torch.stack([s.mean() for s in own])
        spread = torch.stack([s.std() for s in own])
        return Validated(location, spread, slope, bias)

    def weight(self, log_density: Tensor, task: Tensor) -> Tensor:
        z = (log_density - self.location[task]) / self.spread[task]
        return torch.sigmoid(self.slope * z + self.bias)


@dataclass(frozen=True, eq=False)
class Reordered:
    """A calibration seen from a selection of tasks: column i of it is task order[i]."""

    calibration: Calibration
    order: Tensor

    def weight(self, log_density: Tensor, task: Tensor) -> Tensor:
        return self.calibration.weight(log_density, self.order[task])


@dataclass(frozen=True, eq=False)
class Routes:
    """For each image the task whose module answers (NO_TASK: none) and its weights.

    `text_weight` is [N]: each image's own under `image` routing, the batch mean for all under `batch`.
    """

    task: Tensor  # int64 [N]
    weight: Tensor  # float64 [N]
    text_weight: Tensor  # float64 [N]

    def renamed(self, order: Tensor) -> Routes:
        """Routes among the columns of a selection `order`, said in the numbers of what was selected from."""
        task = torch.where(self.task == NO_TASK, NO_TASK, order[self.task.clamp(min=0)])
        return Routes(task, self.weight, self.text_weight)


def unrouted(num_images: int, answering: Answering, learnt: Sequence[int]) -> Routes:
    """Every image to the module learnt last at w = 1 (`latest`), or to none (`frozen`; `joint`, which needs none)."""
    latest = answering == "latest" and len(learnt) > 0
    weight = torch.full((num_images,), 1.0 if latest else 0.0, dtype=torch.float64)
    return Routes(torch.full((num_images,), learnt[-1] if latest else NO_TASK), weight, weight)


def route(log_density: Tensor, calibration: Calibration, routing: Routing) -> Routes:
    """Chooses among the T learnt tasks for one batch; ties go to the lowest task.

    `image`: every image for itself. `batch`: all images are one canonical batch, the majority's task answers for all;
    each image keeps the weight of its own best density, and the text weight is their mean.
    """
    n, num_tasks = log_density.shape
    if num_tasks == 0 or n == 0:
        zero = torch.zeros(n, dtype=torch.float64)
        return Routes(torch.full((n,), NO_TASK), zero, zero)
    best, task = log_density.max(1)
    weight = calibration.weight(best, task)
    if routing == "image":
        return Routes(task, weight, weight)
    votes = torch.bincount(task, minlength=num_tasks)
    majority = int(votes.argmax())
    return Routes(torch.full_like(task, majority), weight, weight.mean().expand(n))
