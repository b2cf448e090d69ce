"""C-ADA: an adapter that grows by a slice a task, old slices frozen (Gao et al., *Beyond Prompt Learning: Continual
Adapter for Efficient Rehearsal-Free Continual Learning*, ECCV 2024, arXiv 2407.10281).

Parallel to the MLP of each block, x its normalised input:

    y = MLP(x) + w · s · Σ_t relu((γ ⊙ x + β) D_t) U_t

Slice t = (D_t [D, rank], U_t [rank, D]) is trained with task t and never again; γ and β (scaling and shifting) are
trained with the first. Each step's loss has `orthogonality` · Σ ‖D_oldᵀ D_new‖² added, which keeps a new slice from
reading what the old ones read. An image is answered under all slices learnt so far, without routing.

From the paper's abstract: growing weights, old ones frozen, scaling and shifting, all in parallel with the frozen
model, an orthogonal loss. `unverified`, as its text could not be opened: the place beside the MLP, γ and β frozen
after the first task, the orthogonal loss's form, s = 0.1 (AdaptFormer's, arXiv 2205.13535), and every hyperparameter
(for ViT-B/16: rank 16 a task, all 12 blocks, orthogonality 1). The paper adapts a ViT with a classifier; here both
towers of CLIP.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Block, Parameters, ResidualBranch, per_image
from diki_ray.learning.methods.base import Step
from diki_ray.learning.methods.residual import ResidualMethod

OLD = "old_"


class ContinualAdapter(ResidualBranch):
    parts: ClassVar[tuple[str, ...]] = ("mlp",)

    def __init__(self, rank: int, scale: float):
        self.rank, self.scale = rank, scale

    def initial(self, block: Block, generator: torch.Generator) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(block.width)
        down = (torch.rand(block.width, self.rank, generator=generator) * 2 - 1) * bound
        return {
            "down": down,
            "up": torch.zeros(self.rank, block.width),
            "gain": torch.ones(block.width),
            "shift": torch.zeros(block.width),
        }

    def part(self, name: str, x: Tensor, y: Tensor, tensors: dict[str, Tensor], weight: float | Tensor) -> Tensor:
        own = {n: t.to(x.dtype) for n, t in tensors.items()}
        gain, shift = (own[n if n in own else OLD + n].unsqueeze(-2) for n in ("gain", "shift"))
        down, up = own["down"], own["up"]
        if OLD + "down" in own:  # the relu is of each unit alone: slices side by side are their sum
            down, up = torch.cat([own[OLD + "down"], down], dim=-1), torch.cat([own[OLD + "up"], up], dim=-2)
        adapted = F.relu((x * gain + shift) @ down) @ up
        return y + per_image(weight, adapted) * (self.scale * adapted)


class CAda(ResidualMethod):
    """Initial `up` is zero: a new slice changes nothing before it is trained."""

    name = "c_ada"
    version = 1
    summary = (
        "C-ADA (Gao et al., ECCV 2024, arXiv 2407.10281): an adapter that grew by a slice with each task; all of it "
        "answers every image"
    )
    sequential = True
    answering = "latest"

    def __init__(
        self,
        backbone: Backbone,
        image_depth: int,
        text_depth: int,
        rank: int,
        scale: float,
        orthogonality: float,
    ):
        branch = ContinualAdapter(rank, scale)
        super().__init__(backbone, (image_depth, branch), (text_depth, branch))
        self.orthogonality = orthogonality

    @staticmethod
    def is_trained(name: str) -> bool:
        return not name.rpartition(".")[2].startswith(OLD)

    def initial(self, generator: torch.Generator, predecessor: Parameters | None = None) -> Parameters:
        own = super().initial(generator)
        if predecessor is None:
            return own
        for key, tensor in predecessor.items():
            layer, _, name = key.rpartition(".")
            name = name.removeprefix(OLD)
            old = f"{layer}.{OLD}{name}"
            if name in ("gain", "shift"):
                own.pop(f"{layer}.{name}", None)
                own[old] = tensor
            elif key != old:  # the predecessor's own slice joins those before it
                before = predecessor.get(old, tensor[:, :0] if name == "down" else tensor[:0])
                own[old] = torch.cat([before, tensor], dim=1 if name == "down" else 0)
        return own

    def extra_loss(self, parameters: Parameters, step: Step) -> Tensor | None:
        overlaps = [
            (old.T @ parameters[key.replace(OLD, "")]).square().sum()
            for key, old in parameters.items()
            if key.endswith(f".{OLD}down")
        ]
        return self.orthogonality * torch.stack(overlaps).sum() if overlaps and self.orthogonality else None
