"""Low-rank changes of the frozen projections, trained on from task to task: what `sequential_lora` and `zscl` share.

LoRA (Hu et al., ICLR 2022, arXiv 2106.09685): W + (α/r) B A beside a frozen W, A [r, D] small and random, B [D, r] zero
at first. Beside the query, key and value projections of both towers, as CLIP-LoRA has it (Zanella and Ben Ayed, CVPR
workshops 2024, arXiv 2405.18541; their code for ViT-B/16: r 2, α 1, all blocks of both towers, AdamW at lr 2e-4 with
weight decay 0.01, batch 32, 500 steps for each shot). Their dropout of 0.25 before A is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Block, Parameters, ResidualBranch, Tower, per_image
from diki_ray.learning.methods.base import Step
from diki_ray.learning.methods.residual import ResidualMethod


@dataclass(frozen=True)
class LowRank(ResidualBranch):
    """y + w (α/r) x Aᵀ Bᵀ. At weight w the projection is exactly W + w (α/r) B A: an interpolation of weights."""

    parts: ClassVar[tuple[str, ...]] = ("q", "k", "v")

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def initial(self, block: Block, generator: torch.Generator) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(block.width)  # of torch's linear layers, as in LoRA's own code
        tensors = {}
        for part in self.parts:
            tensors[f"{part}_down"] = (torch.rand(self.rank, block.width, generator=generator) * 2 - 1) * bound
            tensors[f"{part}_up"] = torch.zeros(block.width, self.rank)
        return tensors

    def part(self, name: str, x: Tensor, y: Tensor, tensors: dict[str, Tensor], weight: float | Tensor) -> Tensor:
        down, up = (tensors[f"{name}_{which}"].to(x.dtype) for which in ("down", "up"))
        change = x @ down.mT @ up.mT
        return y + per_image(weight, change) * self.scale * change


class LowRankMethod(ResidualMethod):
    """One set of low-rank factors that every task trains further; the latest answers everything.

    Tensors that are kept beside the factors (Fisher information, averages) are named `KIND/NAME`.
    """

    sequential = True
    answering = "latest"
    form: ClassVar[type[LowRank]] = LowRank

    def __init__(self, backbone: Backbone, rank: int, alpha: float, image_depth: int | None, text_depth: int | None):
        """image_depth, text_depth: blocks from the first that are changed; None: all."""
        branch = self.form(rank, alpha)
        super().__init__(
            backbone, (_blocks(image_depth, backbone.image), branch), (_blocks(text_depth, backbone.text), branch)
        )
        self.low_rank = branch

    def initial(self, generator: torch.Generator, predecessor: Parameters | None = None) -> Parameters:
        return super().initial(generator) if predecessor is None else trained(predecessor)

    @staticmethod
    def is_trained(name: str) -> bool:
        return "/" not in name

    def effective(self, parameters: Parameters, step: Step | None = None) -> Parameters:
        return trained(parameters)

    def squared_distance(self, parameters: Parameters, others: Parameters) -> Tensor:
        """Σ ‖(α/r)(B A − B' A')‖² over all projections: of the weights, not of their factors."""
        total = torch.zeros(())
        for name, down in parameters.items():
            if not name.endswith("_down"):
                continue
            up_name = name.removesuffix("_down") + "_up"
            # B A − B' A' as one product of rank 2 r: its norm follows from two small Gram matrices.
            left = torch.cat([parameters[up_name], -others[up_name]], dim=1)
            right = torch.cat([down, others[name]], dim=0)
            total = total.to(left.device) + ((left.T @ left) * (right @ right.T)).sum()
        return self.low_rank.scale**2 * total


FIXED = "fixed"
"""The kind of factors that are kept as they were at the start of the first task."""


def trained(parameters: Parameters) -> Parameters:
    """The factors that get gradients alone."""
    return {name: p for name, p in parameters.items() if "/" not in name}


def kept(kind: str, parameters: Parameters) -> Parameters:
    """What is kept of one kind, by the names of the factors."""
    return {name.removeprefix(f"{kind}/"): p for name, p in parameters.items() if name.startswith(f"{kind}/")}


def keep(kind: str, parameters: Parameters) -> Parameters:
    """Copies to be kept beside the factors."""
    return {f"{kind}/{name}": p.detach().clone() for name, p in parameters.items()}


def _blocks(depth: int | None, tower: Tower) -> int:
    return tower.num_blocks if depth is None else depth
