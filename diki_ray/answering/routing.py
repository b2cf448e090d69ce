"""Log densities choose an image's task and its integration weight (method.md, "Inference").

Shapes: N images, E embedding dimensions, T tasks learnt. Densities are log N(f; μ_t, Σ_t), float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from diki_ray.answering.coarse import CoarseGaussians
from diki_ray.answering.gaussians import Gaussians
from diki_ray.learning.methods.base import Answering

Routing = Literal["image", "batch"]
ROUTED: tuple[Answering, ...] = ("routed", "classes")
"""The ways of answering in which a router tells the task of an image."""
NO_TASK = -1
"""The route of an image when nothing is learnt, or when its weight is below `skip_weight`: the frozen model answers."""


class Calibration(Protocol):
    """Says how much of a task's module to let in, given the log density of its own Gaussian."""

    def weight(self, log_density: Tensor, task: Tensor) -> Tensor:
        """Returns integration weights in [0, 1] for log densities [N, T] under the tasks [T], or [N] under [N]."""
        ...


@dataclass(frozen=True)
class Published:
    """w = sigmoid(s / scale + bias). The authors have scale 512 (the embedding dimension of ViT-B/16), bias −1."""

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
class Routes:
    """These are, for each image, the task whose module answers (NO_TASK: none) and its weights.

    `text_weight` is [N]: each image's own under `image` routing, the batch mean for all under `batch`.
    """

    task: Tensor  # int64 [N]
    weight: Tensor  # float64 [N]
    text_weight: Tensor  # float64 [N]

    def of(self, rows: Tensor) -> Routes:
        """Returns the routes of some of the images, by their numbers [M]."""
        return Routes(self.task[rows], self.weight[rows], self.text_weight[rows])


@dataclass(frozen=True, eq=False)
class Scores:
    """This is what a router finds about N images once T tasks are learnt; column i is task learnt[i]."""

    learnt: Sequence[int]
    log_density: Tensor  # float64 [N, T]
    weight: Tensor  # float64 [N, T], the integration weight of each image were it answered by that task

    def routes(self, routing: Routing) -> Routes:
        """Chooses a task for each image of one batch; ties go to the task learnt first.

        `image`: every image goes to its own densest task. `batch`: all images are one canonical batch and the
        majority's task answers for all; each image keeps the weight of its own densest task, and the text weight is
        their mean.
        """
        n, num_tasks = self.log_density.shape
        if num_tasks == 0 or n == 0:
            return unrouted(n, "frozen", self.learnt)
        best = self.log_density.max(1).indices
        weight = self.weight.gather(1, best[:, None])[:, 0]
        order = torch.as_tensor(list(self.learnt))
        if routing == "image":
            return Routes(order[best], weight, weight)
        majority = torch.bincount(best, minlength=num_tasks).argmax()
        return Routes(order[majority].expand(n), weight, weight.mean().expand(n))


class Router(Protocol):
    """Says to which of the tasks learnt an image belongs, and how much of that task's module to let in.

    by_task: whether what it says of one task is the same whichever others are learnt.
    """

    by_task: ClassVar[bool]

    def scores(self, features: Tensor, learnt: Sequence[int]) -> Scores:
        """Returns the scores of frozen features [N, E] once `learnt` (numbers of modules) are learnt, on the CPU."""
        ...

    def about(self, features: Tensor) -> Callable[[Sequence[int]], Scores]:
        """The same for many sets of tasks learnt, of which each is asked about once: what does not depend on the set is
        computed once."""
        ...


@dataclass(frozen=True, eq=False)
class GaussianRouter:
    """Routes by the density of each task's Gaussian, weighed by a calibration of that density alone.

    gaussians: those of all modules; None where there is no module.
    coarse: rules tasks out by a bound where all modules are learnt; their densities are then minus infinity. Every
        density is computed by default, as tables of answers need them.
    """

    by_task: ClassVar[bool] = True
    gaussians: Gaussians | None
    calibration: Calibration
    coarse: CoarseGaussians | None = None

    def scores(self, features: Tensor, learnt: Sequence[int]) -> Scores:
        if self.gaussians is None:
            log_density = torch.zeros(len(features), 0, dtype=torch.float64)
        elif self.coarse is not None and list(learnt) == list(range(len(self.gaussians))):
            log_density = self.coarse.log_density(features).cpu()
        else:
            log_density = self.gaussians.log_density(features, learnt).cpu()
        return self._weighed(learnt, log_density)

    def about(self, features: Tensor) -> Callable[[Sequence[int]], Scores]:
        if self.gaussians is None:
            return partial(self.scores, features)
        log_density = self.gaussians.log_density(features).cpu()
        return lambda learnt: self._weighed(learnt, log_density[:, list(learnt)])

    def _weighed(self, learnt: Sequence[int], log_density: Tensor) -> Scores:
        weight = self.calibration.weight(log_density, torch.as_tensor(list(learnt), dtype=torch.long))
        return Scores(learnt, log_density, weight)


def unrouted(num_images: int, answering: Answering, learnt: Sequence[int]) -> Routes:
    """Sends every image to the module learnt last at w = 1 (`latest`), or to none (`frozen`; `joint` needs none)."""
    latest = answering == "latest" and len(learnt) > 0
    weight = torch.full((num_images,), 1.0 if latest else 0.0, dtype=torch.float64)
    return Routes(torch.full((num_images,), learnt[-1] if latest else NO_TASK), weight, weight)
