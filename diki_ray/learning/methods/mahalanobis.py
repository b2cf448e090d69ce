"""A Mahalanobis metric of each class, for streams in which the same classes come in other domains (Simon et al., *On
Generalizing Beyond Domains in Cross-Domain Continual Learning*, CVPR 2022, arXiv 2203.03970).

**The reading is ours**: from the paper's abstract and figures, there is no public code. Kept of it: a classifier with a
learnt low-rank metric and a bias for each class, and distillation from a moving average of the weights. For a frozen
feature f, with P = L Lᵀ the covariance within classes over all tasks so far, shrunk (OAS), and z = L⁻¹ f:

    score_c(f) = b_c − γ/2 · ( ‖z − m_c‖² + ‖U_c (z − m_c)‖² )
    L = CE(score, y) + distillation · KL( softmax(teacher's scores) ‖ softmax(score) )

m_c, U_c [rank, E], b_c and γ are trained; U_c starts near 0, γ at 3/√E (as the class model's sharpness), b_c at 0. A
class of the task before goes on as it ended: m_c starts at the mean of where it was trained to and of the new images,
each by its number of images, and P has the scatter of all its images so far about their common mean: a direction in
which a class moves from domain to domain counts for less. The teacher, θ̄ ← d θ̄ + (1 − d) θ after each step, goes on.

An image whose zero-shot answer is a class learnt is answered by (1 − β) softmax(zero-shot) + β softmax(score) over the
classes learnt, every other one by zero-shot, as in RAIL. A class has the metric of the last task that had it. Scores of
different tasks' classes are comparable only as far as their metrics are.

Here otherwise than in the paper: the features are the frozen ones (there the backbone is trained, too), because answers
after any tasks come from them; no images are kept, and classes of earlier tasks are not among those trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods.base import OwnImages, Step, TrainingBatch, UntrainedMethod, tensors_of
from diki_ray.learning.methods.low_rank import keep, kept
from diki_ray.learning.methods.rail import fused
from diki_ray.learning.module import TaskModule
from diki_ray.learning.moments import Moments

BY_CLASS = ("mean", "low_rank", "bias", "teacher/mean", "teacher/low_rank", "teacher/bias", "sums/count", "sums/first")
"""Tensors with a row for each class."""
EPS = 1e-7
"""Added to the diagonal of P."""
WHITEN = "shared/whiten"
"""L⁻ᵀ [E, E], float64: f @ it is z."""
FIRST_DEVIATION = 0.1
"""U_c's entries start with this deviation, times 1/√E: at 0 they would get no gradient."""


class Metrics(NamedTuple):
    """The tasks' tensors, and where the metric of each class is: (task, row)."""

    tasks: list[Parameters]
    places: dict[str, tuple[int, int]]


class Mahalanobis(UntrainedMethod):
    """Tensors: `mean` m [C, E], `low_rank` U [C, rank, E], `bias` b [C], `log_scale` log γ. Kept beside them: those of
    the teacher; sums of the frozen features of all the classes' images so far, float64; `shared/whiten`."""

    name = "mahalanobis"
    version = 1
    summary = (
        "a Mahalanobis metric of each class, learnt on frozen features with a moving average of the weights as teacher "
        "(a reading of Simon et al., CVPR 2022, arXiv 2203.03970)"
    )
    sequential = True
    answering = "joint"
    looks_first = True

    def __init__(self, backbone: Backbone, rank: int, distillation: float, average_decay: float, fusion: float):
        super().__init__(backbone)
        self.rank, self.distillation = rank, distillation
        self.average_decay, self.fusion = average_decay, fusion

    def starting(
        self, generator: torch.Generator, class_names: Sequence[str], predecessor: TaskModule | None
    ) -> Parameters:
        """Classes that the task before had go on with its rows."""
        c, e = len(class_names), self.backbone.embed_dim
        own = {
            "mean": torch.zeros(c, e),
            "low_rank": torch.randn(c, self.rank, e, generator=generator) * (FIRST_DEVIATION / math.sqrt(e)),
            "bias": torch.zeros(c),
            "log_scale": torch.tensor(math.log(3 / math.sqrt(e))),
        }
        sums = {
            "count": torch.zeros(c),
            "first": torch.zeros(c, e),
            "second": torch.zeros(e, e),
            "num": torch.zeros(()),
        }
        start = own | keep("teacher", own) | {f"sums/{name}": s.double() for name, s in sums.items()}
        start[WHITEN] = torch.eye(e, dtype=torch.float64)
        if predecessor is not None:
            _go_on(start, class_names, tensors_of(predecessor), predecessor.class_names)
        return start

    @staticmethod
    def is_trained(name: str) -> bool:
        return "/" not in name

    def first_sums(self, parameters: Parameters, batch: TrainingBatch) -> Parameters:
        x = batch.features.cpu().double()
        labels = F.one_hot(batch.labels.cpu(), len(batch.class_tokens)).double()
        return {"count": labels.sum(0), "first": labels.T @ x, "second": x.T @ x}

    def begin(self, parameters: Parameters, sums: Parameters, class_tokens: Tensor) -> Parameters:
        p = {name: tensor.detach().cpu().double() for name, tensor in parameters.items()}
        before, new = kept("sums", p), sums | {"num": sums["count"].sum()}
        total = {name: before[name] + new[name] for name in before}
        whiten = torch.linalg.inv(torch.linalg.cholesky(_within(total))).T
        change = torch.linalg.solve(p[WHITEN], whiten)  # of coordinates, from those of the task before
        known = before["count"] > 0
        means = (sums["first"] @ whiten) / sums["count"].clamp(min=1)[:, None]
        share = (before["count"] / total["count"].clamp(min=1))[:, None]
        found = {
            "mean": share * (p["mean"] @ change) + (1 - share) * means,
            "teacher/mean": torch.where(known[:, None], p["teacher/mean"] @ change, means),
        }
        for name in ("low_rank", "teacher/low_rank"):
            moved = p[name] @ torch.linalg.inv(change).T
            found[name] = torch.where(known[:, None, None], moved, p[name])
        return parameters | found | {f"sums/{name}": s for name, s in total.items()} | {WHITEN: whiten}

    def logits(self, features: Tensor, texts: Tensor, parameters: Parameters) -> Tensor:
        return scores(features @ parameters[WHITEN].to(features.dtype), parameters)

    def image_losses(self, own: OwnImages, parameters: Parameters, step: Step) -> Tensor:
        z = own.features.detach() @ parameters[WHITEN].to(own.features.dtype)
        target = scores(z, kept("teacher", parameters)).log_softmax(1)
        student = scores(z, parameters).log_softmax(1)
        return self.distillation * F.kl_div(student, target, log_target=True, reduction="none").sum(1)

    def after_step(self, parameters: Parameters, gradients: Parameters, step: Step) -> None:
        for name, teacher in kept("teacher", parameters).items():
            teacher.lerp_(parameters[name], 1 - self.average_decay)

    def join(self, modules: Sequence[TaskModule]) -> Metrics:
        """The metrics of all classes learnt, each of the last module that has the class."""
        tasks = [tensors_of(module) for module in modules]
        places = {
            name: (task, row)
            for task, module in enumerate(modules)
            for row, name in enumerate(module.class_names)
            if tasks[task]["sums/count"][row] > 0
        }
        return Metrics(tasks, places)

    def joint_logits(self, joined: Metrics, features: Tensor, zero_shot: Tensor, names: Sequence[str]) -> Tensor:
        known = torch.tensor([name in joined.places for name in names])
        if not known.any():
            return zero_shot
        found = torch.full((len(features), len(names)), -torch.inf)
        for task, parameters in enumerate(joined.tasks):
            columns = [c for c, name in enumerate(names) if joined.places.get(name, (-1, -1))[0] == task]
            if columns:
                own = self.logits(features.cpu(), zero_shot, parameters)
                found[:, columns] = own[:, [joined.places[names[c]][1] for c in columns]]
        scale = self.backbone.model.logit_scale.exp().float().cpu()
        return fused(zero_shot, found.softmax(1), known, self.fusion, scale)


def scores(z: Tensor, parameters: Parameters) -> Tensor:
    """[b, C] of whitened features z [b, E]."""
    mean, low_rank = parameters["mean"], parameters["low_rank"]
    squared = z.square().sum(1, keepdim=True) + mean.square().sum(1) - 2 * z @ mean.T
    along = torch.einsum("be,cre->bcr", z, low_rank) - torch.einsum("ce,cre->cr", mean, low_rank)
    return parameters["bias"] - parameters["log_scale"].exp() / 2 * (squared + along.square().sum(2))


def _within(sums: Parameters) -> Tensor:
    """P [E, E] from the sums of all images so far; where no class has a second image nothing tells the scatter within
    from that between, and it is taken to be half of the whole."""
    count, first, num = sums["count"], sums["first"], int(sums["num"])
    scatter = sums["second"] - _between(count, first)
    if num <= int((count > 0).sum()):
        scatter = 0.5 * (sums["second"] - _between(count.sum(0, keepdim=True), first.sum(0, keepdim=True)))
    moments = Moments(max(num, 2), np.zeros(len(scatter)), scatter.numpy())
    return torch.from_numpy(moments.covariance(EPS, "oas"))


def _go_on(start: Parameters, names: Sequence[str], before: Parameters, names_before: Sequence[str]) -> None:
    """Puts into a task's tensors what the task before, with classes of its own, left behind."""
    shared = [(names.index(name), row) for row, name in enumerate(names_before) if name in names]
    gone = [row for row, name in enumerate(names_before) if name not in names]
    own, theirs = ([pair[which] for pair in shared] for which in (0, 1))
    for name in BY_CLASS:
        start[name][own] = before[name][theirs]
    for name in ("log_scale", "teacher/log_scale", "sums/num", WHITEN):
        start[name] = before[name]
    # The scatter about the means of classes that are not here stays in that of all.
    start["sums/second"] = before["sums/second"] - _between(before["sums/count"][gone], before["sums/first"][gone])


def _between(counts: Tensor, first: Tensor) -> Tensor:
    """Σ_c n_c μ_c μ_cᵀ [E, E] from counts [C] and sums of features [C, E]."""
    return (first / counts.clamp(min=1)[:, None]).T @ first
