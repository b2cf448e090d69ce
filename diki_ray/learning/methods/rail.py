"""RAIL: recursive ridge regression on frozen features (Xu et al., NeurIPS 2024, arXiv 2406.18868), in its primal form.

    φ(f) = relu(R f), R random, never trained          W = (Σ_t Φ_tᵀ Φ_t + λ I)⁻¹ Σ_t Φ_tᵀ Y_t

The paper updates W and the inverse from task to task and proves that this equals the regression on all data at once.
Here the sums are kept instead, in float64: they are additive, so a module depends on its own task alone, and whatever
order the tasks came in, W is the same. Columns of Y are class names; a name in two tasks is one column.

An image whose zero-shot answer is a class learnt by then is answered by (1 − β) softmax(zero-shot) + β φ(f) W (0 for a
class not learnt), every other one zero-shot: what was never learnt is answered exactly as before.

The authors' code for ViT-B/16 (primal): 15,000 hidden dimensions, λ = 0.1, β = 0.9, R as torch initialises a linear
layer. At 15,000 a task's sums take 1.8 GB; at 2,048, the default here, 34 MB. The dual form, a kernel over the features
of all training images, is not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods.base import TrainingBatch, UntrainedMethod
from diki_ray.learning.module import TaskModule


class Regression(NamedTuple):
    """What all modules know together."""

    columns: dict[str, int]
    weights: Tensor  # float64 [H, classes]


class Rail(UntrainedMethod):
    name = "rail"
    version = 1
    summary = (
        "RAIL (Xu et al., NeurIPS 2024, arXiv 2406.18868): ridge regression on random features of the frozen ones for "
        "images that zero-shot gives to a learnt class, zero-shot for all others"
    )
    answering = "joint"

    def __init__(self, backbone: Backbone, hidden_dim: int, ridge: float, fusion: float, projection_seed: int):
        super().__init__(backbone)
        self.ridge, self.fusion = ridge, fusion
        generator = torch.Generator().manual_seed(projection_seed)
        uniform = torch.rand(hidden_dim, backbone.embed_dim, generator=generator, dtype=torch.float64) * 2 - 1
        self._projection = uniform / math.sqrt(backbone.embed_dim)

    def expanded(self, features: Tensor) -> Tensor:
        """φ: float64 [B, H] on the CPU from features [B, E]."""
        return (features.cpu().double() @ self._projection.T).relu()

    def sums(self, parameters: Parameters, batch: TrainingBatch) -> Parameters:
        phi = self.expanded(batch.features)
        labels = F.one_hot(batch.labels.cpu(), len(batch.class_tokens)).double()
        return {"autocorrelation": phi.T @ phi, "crosscorrelation": phi.T @ labels}

    def join(self, modules: Sequence[TaskModule]) -> Regression:
        """The regression on all their tasks; by key, so that it is the same to the last bit in any order."""
        modules = sorted(modules, key=lambda module: module.key)
        columns = {name: n for n, name in enumerate(sorted({name for m in modules for name in m.class_names}))}
        hidden_dim = len(self._projection)
        auto = self.ridge * torch.eye(hidden_dim, dtype=torch.float64)
        cross = torch.zeros(hidden_dim, len(columns), dtype=torch.float64)
        for module in modules:
            auto += torch.from_numpy(module.parameters["autocorrelation"])
            index = torch.tensor([columns[name] for name in module.class_names])
            cross.index_add_(1, index, torch.from_numpy(module.parameters["crosscorrelation"]))
        return Regression(columns, torch.cholesky_solve(cross, torch.linalg.cholesky(auto)))

    def joint_logits(self, joined: Regression, features: Tensor, zero_shot: Tensor, names: Sequence[str]) -> Tensor:
        known = torch.tensor([name in joined.columns for name in names])
        index = torch.tensor([joined.columns.get(name, 0) for name in names])
        regressed = (self.expanded(features) @ joined.weights)[:, index] * known
        scale = self.backbone.model.logit_scale.exp().float().cpu()
        return fused(zero_shot, regressed.float(), known, self.fusion, scale)


def fused(zero_shot: Tensor, own: Tensor, known: Tensor, share: float, scale: Tensor) -> Tensor:
    """Logits [B, C] of images whose zero-shot answer is a class that is known (bool [C]) from zero-shot and a method's
    own scores, of which all have the given share, and of the others from zero-shot alone, as they are."""
    mixed = (1 - share) * zero_shot.softmax(1) + share * own
    seen = known[zero_shot.argmax(1)]
    # Scores as logits: their scale changes confidences, never an answer.
    return torch.where(seen[:, None], scale * mixed, zero_shot)
