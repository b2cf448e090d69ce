"""The one way an image is answered, for evaluation, prediction and serving: its frozen features give its densities,
they give its route, the route its image features, and those its logits.

Shapes: B images, C candidate classes, E embedding dimensions, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diki_ray.answering.class_features import Candidates, ClassFeatures, PromptedClasses
from diki_ray.answering.class_head import ClassHead
from diki_ray.answering.routing import NO_TASK, ROUTED, Router, Routes, Routing, Scores, unrouted
from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Parameters
from diki_ray.errors import CorruptError
from diki_ray.learning.methods.base import Method
from diki_ray.learning.module import TaskModule


@dataclass(eq=False)
class Predictor:
    """Answers images with the modules learnt so far. Tasks are numbered as `modules` are.

    router: chooses the module and its weight for each image, where the method is `routed`.
    class_features: where class features come from; predictors over the same backbone may share it.
    skip_weight: images whose weight is below it get the frozen model's answer without a residual pass; 0 is off.
    head: the class model, where it answers alone or beside the modules.
    """

    method: Method
    modules: Sequence[TaskModule]
    router: Router
    class_features: ClassFeatures
    skip_weight: float = 0.0
    head: ClassHead | None = None
    parameters: list[Parameters] = field(init=False, default_factory=list)
    _joined: dict[tuple[int, ...], Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.has_modules:
            return
        device = self.backbone.device
        self.parameters = [
            self.method.effective({n: torch.from_numpy(np.array(p)).to(device) for n, p in module.parameters.items()})
            for module in self.modules
        ]

    @property
    def has_modules(self) -> bool:
        """Says whether images are answered under a task's module; else they are by their frozen features."""
        return self.method.answering in ("routed", "latest")

    @property
    def backbone(self) -> Backbone:
        return self.method.backbone

    @torch.no_grad()
    def frozen_features(self, images: Tensor) -> Tensor:
        """Returns [B, E] float32 on the CPU. They decide the route, and are the answer where nothing learnt applies.

        Raises:
            CorruptError: some are not finite, as where the backbone's weights are damaged.
        """
        return _finite(self.backbone.encode_image(images).cpu(), "frozen features")

    def scores(self, features: Tensor, learnt: Sequence[int] | None = None) -> Scores:
        """Returns the densities of frozen features [B, E] under each of the tasks `learnt`, in that order, and the
        weights at which each task would answer. All modules are learnt by default.

        Raises:
            CorruptError: a density or weight is not finite; a density may be minus infinity, where it was ruled out.
        """
        scores = self.router.scores(features, range(len(self.modules)) if learnt is None else learnt)
        ruled_out = scores.log_density == -torch.inf
        _finite(scores.log_density.masked_fill(ruled_out, 0.0), "log densities")
        _finite(scores.weight, "integration weights")
        if self.method.answering in ROUTED:
            return scores
        return replace(scores, weight=torch.full_like(scores.weight, self.method.answering == "latest"))

    def routes(self, scores: Scores, routing: Routing) -> Routes:
        """Chooses the task and weights of each image among the tasks of the scores; ties go to the first. A method that
        is not routed has its own rule (`Method.answering`)."""
        if self.method.answering in ROUTED:
            return scores.routes(routing)
        return unrouted(len(scores.log_density), self.method.answering, scores.learnt)

    def answering_task(self, routes: Routes) -> Tensor:
        """Returns int64 [B], the task that answers each image; it is NO_TASK also below `skip_weight`."""
        return torch.where(routes.weight < self.skip_weight, NO_TASK, routes.task)

    def _module(self, routes: Routes) -> Tensor:
        task = self.answering_task(routes)
        return task if self.has_modules else torch.full_like(task, NO_TASK)

    @torch.no_grad()
    def image_features(self, images: Tensor, frozen: Tensor, routes: Routes) -> Tensor:
        """Returns [B, E] on the CPU: each image under its task's module at its weight, and frozen where none applies.

        images [B, 3, H, W] are read only where a residual pass is needed; frozen [B, E] are their frozen features.
        """
        task = self._module(routes)
        features = frozen.clone()
        prompted = (task != NO_TASK).nonzero().flatten()
        if len(prompted):
            features[prompted] = self._prompted(images[prompted], task[prompted], routes.weight[prompted])
        return features

    def logits_of_features(self, features: Tensor, routes: Routes, candidates: Candidates) -> Tensor:
        """Returns [B, C] float32 on the CPU, for features that `image_features` gave for the same routes."""
        task = self._module(routes)
        out = torch.empty(len(features), len(candidates.names))
        for t in task.unique().tolist():
            rows = (task == t).nonzero().flatten()
            weight = routes.text_weight[rows].float() if t != NO_TASK else torch.zeros(len(rows))
            out[rows] = self.class_features.logits(features[rows], weight, self.classes(t, candidates))
        return out

    def logits(self, images: Tensor, frozen: Tensor, routes: Routes, candidates: Candidates) -> Tensor:
        """Returns [B, C] float32 on the CPU: the logits of what `image_features` gives."""
        return self.logits_of_features(self.image_features(images, frozen, routes), routes, candidates)

    def answer_logits(
        self,
        features: Tensor,
        frozen: Tensor,
        routes: Routes,
        candidates: Sequence[Candidates],
        learnt: Sequence[int] | None = None,
    ) -> Tensor:
        """Returns [B, all candidates] as the method answers once `learnt` are learnt (all modules by default).

        features are those that `image_features` gave, and routes those that `routes` gave for the same tasks learnt.

        Raises:
            CorruptError: some are not finite.
        """
        return _finite(self._answer_logits(features, frozen, routes, candidates, learnt), "logits")

    def _answer_logits(
        self,
        features: Tensor,
        frozen: Tensor,
        routes: Routes,
        candidates: Sequence[Candidates],
        learnt: Sequence[int] | None,
    ) -> Tensor:
        logits = torch.cat([self.logits_of_features(features, routes, c) for c in candidates], dim=1)
        names = [name for c in candidates for name in c.names]
        learnt = range(len(self.modules)) if learnt is None else learnt
        if self.head is not None:
            zero_shot = self.zero_shot_logits(frozen, candidates) if self.has_modules else logits
            return self.head.logits(frozen, logits, zero_shot, names, learnt)
        return self.joint_logits(frozen, logits, names, learnt) if self.method.answering == "joint" else logits

    def zero_shot_logits(self, frozen: Tensor, candidates: Sequence[Candidates]) -> Tensor:
        """Returns the frozen model's logits [B, all candidates]."""
        alone = unrouted(len(frozen), "frozen", ())
        return torch.cat([self.logits_of_features(frozen, alone, c) for c in candidates], dim=1)

    @torch.no_grad()
    def joint_logits(self, frozen: Tensor, zero_shot: Tensor, names: Sequence[str], learnt: Sequence[int]) -> Tensor:
        """Returns a `joint` method's logits [B, C] among candidates of these names; they are the zero-shot ones where
        nothing is learnt."""
        if not learnt:
            return zero_shot
        key = tuple(learnt)
        if key not in self._joined:  # the last one's alone is kept: a regression may be as large as all modules
            self._joined = {key: self.method.join([self.modules[t] for t in key])}
        return self.method.joint_logits(self._joined[key], frozen, zero_shot, names)

    def classes(self, task: int, candidates: Candidates) -> PromptedClasses:
        """Returns the candidates under a task's text prompts, or under none for NO_TASK."""
        if task == NO_TASK:
            return PromptedClasses(self.backbone, candidates, lambda tokens, _: self.backbone.encode_text(tokens), "")
        parameters, method = self.parameters[task], self.method
        return PromptedClasses(
            self.backbone,
            candidates,
            lambda tokens, weight: method.text_features(tokens, parameters, weight),
            self.modules[task].digest,
        )

    def interpolation_error(self, task: int, candidates: Candidates) -> float:
        """Returns the largest absolute error of one of the candidates' features under a task's prompts; 0 if exact."""
        return self.class_features.error(self.classes(task, candidates))

    def interpolated(self, task: int, candidates: Candidates) -> bool:
        """Says whether interpolated features of the candidates under a task's prompts were used."""
        return self.class_features.interpolated(self.classes(task, candidates))

    def _prompted(self, images: Tensor, task: Tensor, weight: Tensor) -> Tensor:
        """Makes one residual pass over images of any mixture of tasks: prompts are gathered per image."""
        present, index = task.unique(return_inverse=True)
        device = self.backbone.device
        if len(present) == 1:
            parameters = self.parameters[int(present)]
        else:
            chosen = [self.parameters[t] for t in present.tolist()]
            index = index.to(device)
            parameters = {n: torch.stack([p[n] for p in chosen])[index] for n in chosen[0] if n.startswith("image.")}
        return self.method.image_features(images, parameters, weight.float().to(device)).cpu()


def _finite(values: Tensor, what: str) -> Tensor:
    """The values; CorruptError where one is NaN or infinite, which nothing learnt and no image gives."""
    if not torch.isfinite(values).all():
        raise CorruptError(
            f"the {what} of an image are not finite numbers, so there is no answer: a module or the backbone's weights "
            "hold what no training leaves. `diki-ray store verify` reads the modules of a run."
        )
    return values
