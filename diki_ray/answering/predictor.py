"""Frozen pass -> densities -> task and weight -> residual pass -> logits: the one way an image is answered, for
evaluation, prediction and serving.

Shapes: B images, C candidate classes, K templates a class, E embedding dimensions, T tasks, G grid points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diki_ray.answering.class_features import ClassTable, FeatureCache
from diki_ray.answering.coarse import CoarseGaussians
from diki_ray.answering.gaussians import Gaussians
from diki_ray.answering.routing import NO_TASK, Calibration, Reordered, Routes, Routing, route, unrouted
from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods.base import Method
from diki_ray.learning.module import TaskModule


@dataclass(frozen=True, eq=False)
class Candidates:
    """The classes an image may be answered with: names, and tokens [C, K, L] (K templates: the mean of their
    normalised features, normalised again, is the class's feature)."""

    names: tuple[str, ...]
    tokens: Tensor
    key: str = ""
    """Identifies these candidates in the predictor's tables of class features."""

    @staticmethod
    def of(backbone: Backbone, class_names: Sequence[str], templates: Sequence[str]) -> Candidates:
        tokens = torch.stack([backbone.tokenize(class_names, template) for template in templates], dim=1)
        return Candidates(tuple(class_names), tokens, repr((tuple(class_names), tuple(templates))))


@dataclass(eq=False)
class Predictor:
    """Answers images with the modules learnt so far.

    text_grid: class features are tabulated at this many weights in [0, 1] and interpolated (exact at the grid points;
        `interpolation_error` measures the rest); 0: exact for every image, one text pass for each distinct weight.
    skip_weight: images whose weight is below it get the frozen model's answer without a residual pass; 0 is off.
    """

    method: Method
    modules: Sequence[TaskModule]
    gaussians: Gaussians | CoarseGaussians | None
    calibration: Calibration
    text_grid: int = 33
    skip_weight: float = 0.0
    text_batch: int = 1024
    always_tabulated: bool = False
    """Also where all images of a task in a batch have one weight: an answer does not depend on what shares its batch,
    and a task's only image in a batch costs no text pass."""
    table_bytes: float = math.inf
    """Of class features kept in tables; the longest unused are computed again beyond it."""
    _tables: dict[tuple[int, str], ClassTable] = field(default_factory=dict)
    _parameters: list[Parameters] = field(default_factory=list)
    _fixed: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    _joined: dict[tuple[int, ...], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._kept = FeatureCache(self.table_bytes)
        if self.method.answering not in ("routed", "latest"):
            return
        device = self.method.backbone.device
        self._parameters = [
            self.method.effective({n: torch.from_numpy(np.array(p)).to(device) for n, p in module.parameters.items()})
            for module in self.modules
        ]

    @property
    def backbone(self) -> Backbone:
        return self.method.backbone

    @torch.no_grad()
    def frozen_features(self, images: Tensor) -> Tensor:
        """[B, E] float32 on the CPU; they decide the route and are the answer where nothing learnt applies."""
        return self.backbone.encode_image(images).cpu()

    def log_density(self, features: Tensor) -> Tensor:
        """[B, T] float64 under the Gaussian of every module, in the order of `modules`."""
        if self.gaussians is None:
            return torch.zeros(len(features), 0, dtype=torch.float64)
        return self.gaussians.log_density(features).cpu()

    def route(self, log_density: Tensor, routing: Routing, learnt: Sequence[int] | None = None) -> Routes:
        """Routes among the modules `learnt`, in that order (ties go to the first); among all by default. A method that
        is not routed has its own rule (`Method.answering`)."""
        if self.method.answering != "routed":
            return unrouted(
                len(log_density), self.method.answering, range(len(self.modules)) if learnt is None else learnt
            )
        if learnt is None or list(learnt) == list(range(log_density.shape[1])):
            return route(log_density, self.calibration, routing)
        order = torch.as_tensor(list(learnt), dtype=torch.long)
        return route(log_density[:, order], Reordered(self.calibration, order), routing).renamed(order)

    def weights(self, log_density: Tensor) -> Tensor:
        """[B, T] float64: for each module the weight of each image, were it answered by that module."""
        if self.method.answering != "routed":
            return torch.full(log_density.shape, float(self.method.answering == "latest"), dtype=torch.float64)
        columns = [
            self.calibration.weight(log_density[:, t], torch.full((len(log_density),), t))
            for t in range(log_density.shape[1])
        ]
        return torch.stack(columns, dim=1) if columns else torch.zeros_like(log_density)

    def answer_logits(
        self,
        images: Tensor,
        frozen: Tensor,
        routes: Routes,
        candidates: Sequence[Candidates],
        learnt: Sequence[int] | None = None,
    ) -> Tensor:
        """[B, all candidates] as the method answers once `learnt` are learnt; routes are `route`'s of the same."""
        features = self.image_features(images, frozen, routes)
        logits = torch.cat([self.logits_of_features(features, routes, c) for c in candidates], dim=1)
        if self.method.answering != "joint":
            return logits
        names = [name for c in candidates for name in c.names]
        return self.joint_logits(frozen, logits, names, range(len(self.modules)) if learnt is None else learnt)

    @torch.no_grad()
    def joint_logits(self, frozen: Tensor, zero_shot: Tensor, names: Sequence[str], learnt: Sequence[int]) -> Tensor:
        """[B, C] of a `joint` method among candidates of these names; nothing learnt: the zero-shot logits."""
        if not learnt:
            return zero_shot
        key = tuple(learnt)
        if key not in self._joined:
            self._joined[key] = self.method.join([self.modules[t] for t in key])
        return self.method.joint_logits(self._joined[key], frozen, zero_shot, names)

    def logits(self, images: Tensor, frozen: Tensor, routes: Routes, candidates: Candidates) -> Tensor:
        """[B, C] float32 on the CPU. images [B, 3, H, W] are read only where a residual pass is needed; frozen [B, E]
        are their frozen features."""
        return self.logits_of_features(self.image_features(images, frozen, routes), routes, candidates)

    @torch.no_grad()
    def image_features(self, images: Tensor, frozen: Tensor, routes: Routes) -> Tensor:
        """[B, E] on the CPU: each image under its task's module at its weight; the frozen ones where none applies."""
        task = self._answering_task(routes)
        features = frozen.clone()
        prompted = (task != NO_TASK).nonzero().flatten()
        if len(prompted):
            features[prompted] = self._prompted(images[prompted], task[prompted], routes.weight[prompted])
        return features

    def logits_of_features(self, features: Tensor, routes: Routes, candidates: Candidates) -> Tensor:
        """[B, C] of features that `image_features` gave for the same routes."""
        task = self._answering_task(routes)
        out = torch.empty(len(features), len(candidates.names))
        for t in task.unique().tolist():
            rows = (task == t).nonzero().flatten()
            weight = routes.text_weight[rows].float() if t != NO_TASK else torch.zeros(len(rows))
            out[rows] = self._logits_of_task(features[rows], t, weight, candidates)
        return out

    def _answering_task(self, routes: Routes) -> Tensor:
        return torch.where(routes.weight < self.skip_weight, NO_TASK, routes.task)

    def _prompted(self, images: Tensor, task: Tensor, weight: Tensor) -> Tensor:
        """One residual pass over images of any mixture of tasks: prompts are gathered per image."""
        present, index = task.unique(return_inverse=True)
        device = self.backbone.device
        if len(present) == 1:
            parameters = self._parameters[int(present)]
        else:
            chosen = [self._parameters[t] for t in present.tolist()]
            index = index.to(device)
            parameters = {n: torch.stack([p[n] for p in chosen])[index] for n in chosen[0] if n.startswith("image.")}
        return self.method.image_features(images, parameters, weight.float().to(device)).cpu()

    def _logits_of_task(self, features: Tensor, task: int, weight: Tensor, candidates: Candidates) -> Tensor:
        distinct = weight.unique()
        tabulated = self.always_tabulated and self.text_grid and self.method.answering == "routed"
        if task == NO_TASK or (len(distinct) == 1 and not tabulated):
            # Frozen, or one text weight for all (batch routing): exact.
            text = self._fixed_features(task, float(distinct[0]), candidates)
            return self.backbone.logits(features, text.cpu())
        if not self.text_grid:
            out = torch.empty(len(features), len(candidates.names))
            for w in distinct.tolist():
                rows = weight == w
                out[rows] = self.backbone.logits(features[rows], self.class_features(task, w, candidates).cpu())
            return out
        return self.interpolated(features, weight, self._table(task, candidates))

    def _fixed_features(self, task: int, weight: float, candidates: Candidates) -> Tensor:
        """Class features [C, E]; kept where every batch asks for the same ones (the frozen model's, and those of a
        module that is always answered with at w = 1), but not by a predictor for single requests (text_grid 0), whose
        candidates are anybody's."""
        if not self.text_grid or not candidates.key or not (task == NO_TASK or self.method.answering == "latest"):
            return self.class_features(task, weight, candidates)
        key = (task, candidates.key)
        if key not in self._fixed:
            self._fixed[key] = self.class_features(task, weight, candidates).cpu()
        return self._fixed[key]

    def interpolated(self, features: Tensor, weight: Tensor, table: Sequence[Tensor] | Tensor) -> Tensor:
        """[B, C] logits from class features [C, E] at G weights; of them only those beside a weight are asked for.

        f · normalise((1−a) T_g + a T_{g+1}) for each image, without its own [C, E] class features: both ends are unit
        vectors, so the norm is √((1−a)² + a² + 2a(1−a) T_g·T_{g+1})."""
        position = weight * (len(table) - 1)
        cell = position.long().clamp(max=len(table) - 2)
        a = (position - cell).unsqueeze(1)
        out = torch.empty(len(features), len(table[int(cell[0])]))
        for g in cell.unique().tolist():
            rows = cell == g
            low, high, ar = table[g], table[g + 1], a[rows]
            cosine = (low * high).sum(1)
            norm = ((1 - ar) ** 2 + ar**2 + 2 * ar * (1 - ar) * cosine).sqrt()
            mixed = (1 - ar) * self.backbone.logits(features[rows], low) + ar * self.backbone.logits(
                features[rows], high
            )
            out[rows] = mixed / norm
        return out

    def _table(self, task: int, candidates: Candidates) -> ClassTable:
        """[G, C, E] class features at G weights from 0 to 1, on the CPU."""
        key = (task, candidates.key)
        if key not in self._tables:
            at = partial(self.class_features, task, candidates=candidates)
            self._tables[key] = ClassTable(self.text_grid, self._kept, key, at)
        return self._tables[key]

    @torch.no_grad()
    def class_features(self, task: int, weight: float, candidates: Candidates) -> Tensor:
        """[C, E] of the candidates under a task's text prompts at a weight; NO_TASK: frozen."""
        c, k, _ = candidates.tokens.shape
        parts = []
        for chunk in candidates.tokens.flatten(0, 1).split(self.text_batch):
            if task == NO_TASK:
                parts.append(self.backbone.encode_text(chunk))
            else:
                parts.append(self.method.text_features(chunk, self._parameters[task], weight))
        features = torch.cat(parts).unflatten(0, (c, k))
        return features[:, 0] if k == 1 else F.normalize(features.mean(1), dim=-1)

    def tables(self) -> list[tuple[int, str]]:
        """(task, candidates' key) of the tables in use."""
        return list(self._tables)

    def interpolation_error(self, task: int, candidates: Candidates) -> float:
        """The largest absolute error of an interpolated class feature, at the middle of every grid cell, where the
        error of a linear interpolation is greatest."""
        table = torch.stack(list(self._table(task, candidates)))
        middle = F.normalize((table[1:] + table[:-1]) / 2, dim=-1)
        weights = [(g + 0.5) / (len(table) - 1) for g in range(len(middle))]
        exact = torch.stack([self.class_features(task, w, candidates).cpu() for w in weights])
        return float((middle - exact).abs().max())
