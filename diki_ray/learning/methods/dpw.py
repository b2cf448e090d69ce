"""DPW: prompts weighted by a gate for each token (Jang, Kwon, Lee, *Enhancing Continual Learning of Vision-Language
Models via Dynamic Prefix Weighting*, CVPR 2026, arXiv 2604.18075; read with the authors' code, YonseiML/dpw, 2026).

Beside the frozen attention of each block, x its normalised input, P prompts, for each head of the prompts:

    z = x A + b                      [P] scores of a token
    g = sigmoid(z),  n = max(1, Σ g) the gates' sum is capped at 1
    term = (g / n) V + (n − 1) · a(x)

so that what the cap cuts off weights the low-rank adapter a(x) = 0.05 · (x D U + c). A starts as the left singular
vectors of W_q W_kᵀ, b at −4 (images) and −2 (texts), V as the left singular vectors of W_v scaled by the mean norm of
its columns, D (not trained) as the leading left singular vectors of W_v in the space of x, U ~ N(0, 0.02²).

Cutoff: an image whose integration weight is below 0.825 keeps a gate g/n only where it is above 1 − p, with p =
sigmoid(log N(z_CLS; mean, variance)) for each prompt, over the [CLS] scores of the task's own training images; a text
keeps it only above 1 − w. Routing by the Gaussians as in DIKI.

Published for ViT-B/16: depth 12, length 8 in both towers, adapter rank 64; SGD at lr 1.25, batch 32, 10 epochs.

Here otherwise than in the authors' code: the prompts have the tower's own number of heads (there a power of two times
it, chosen by how fine-grained a task is); b is one for all tokens (there one for each position); the singular vectors
are those of the product in the space of x (there of the stored matrices, whose rows are outputs); the cutoff is each
image's own (there the batch's); [CLS] statistics are of the module that is kept (there of its last epoch); no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Block, Heads, Parameters, Residual, ResidualBranch, per_image, split_heads
from diki_ray.errors import ConfigError
from diki_ray.learning.methods.base import TrainingBatch
from diki_ray.learning.methods.residual import ResidualMethod

CUTOFF_BELOW = 0.825
ADAPTER_SCALE = 0.05
MIN_VARIANCE = 1e-6


@dataclass(frozen=True)
class GatedPrompts(ResidualBranch):
    by_token = False  # the class token's scores decide for all

    length: int
    rank: int
    bias: float
    record: list[Tensor] | None = field(default=None, compare=False)
    """Where each block's [CLS] scores [B, h, P] go, when they are asked for."""

    def initial(self, block: Block, generator: torch.Generator) -> dict[str, Tensor]:
        heads, width = block.attention.heads, block.width
        if self.length * heads > width or self.rank > width:
            raise ConfigError(
                f"method: {heads} heads of {self.length} prompts and rank {self.rank} do not fit a width of {width}; "
                "choose fewer."
            )
        query, key, value = block.projections()  # [D, D] each, for x from the left
        gates = torch.linalg.svd(query @ key.T)[0][:, : self.length * heads]
        values = torch.linalg.svd(value.T)[0][:, : self.length].T * value.norm(dim=1).mean()
        return {
            "gate": gates.unflatten(1, (heads, self.length)).permute(1, 0, 2).contiguous(),  # [h, D, P]
            "gate_bias": torch.full((heads, self.length), self.bias),
            "values": values.contiguous(),
            "fixed_down": torch.linalg.svd(value)[0][:, : self.rank].contiguous(),
            "up": torch.randn(self.rank, width, generator=generator) * 0.02,
            "up_bias": torch.zeros(width),
        }

    def heads(self, heads: Heads, tensors: dict[str, Tensor], weight: float | Tensor) -> Tensor:
        out, x, q = heads.frozen(), heads.x, heads.q
        t = {name: tensor.to(x.dtype) for name, tensor in tensors.items()}
        scores = x.unsqueeze(1) @ t["gate"] + t["gate_bias"].unsqueeze(-2)  # [B, h, L, P]
        if self.record is not None:
            self.record.append(scores[:, :, 0].detach())
        gates, excess = capped(scores.sigmoid())
        gates = self._cut(gates, scores, tensors, weight)
        adapted = (x @ t["fixed_down"] @ t["up"] + t["up_bias"].unsqueeze(-2)) * ADAPTER_SCALE
        adapted = adapted.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
        term = gates @ split_heads(t["values"], q) + excess * adapted
        return out + per_image(weight, term) * term

    def _cut(self, gates: Tensor, scores: Tensor, tensors: dict[str, Tensor], weight: float | Tensor) -> Tensor:
        w = torch.as_tensor(weight, dtype=torch.float32, device=gates.device).reshape(-1, 1, 1, 1)
        if bool((w >= CUTOFF_BELOW).all()):
            return gates
        if "cls_mean" in tensors:
            mean, variance = tensors["cls_mean"], tensors["cls_variance"].clamp(min=MIN_VARIANCE)
            normal = torch.distributions.Normal(mean.float(), variance.float().sqrt())
            familiar = normal.log_prob(scores[:, :, 0].float()).sigmoid().unsqueeze(2)  # [B, h, 1, P]
        else:
            familiar = w
        keep = (w >= CUTOFF_BELOW) | (gates.float() > 1 - familiar)
        return torch.where(keep, gates, torch.zeros_like(gates))


def capped(gates: Tensor) -> tuple[Tensor, Tensor]:
    """Gates [..., P] whose sum is at most 1, and by how much the sum was above it [..., 1]."""
    total = gates.sum(-1, keepdim=True).clamp(min=1)
    return gates / total, total - 1


class Dpw(ResidualMethod):
    name = "dpw"
    version = 1
    summary = (
        "DPW (Jang et al., CVPR 2026, arXiv 2604.18075): prompts weighted by a gate for each token and a low-rank "
        "adapter, switched on for an image as far as it looks like something learnt"
    )

    def __init__(
        self, backbone: Backbone, image_depth: int, image_length: int, text_depth: int, text_length: int, rank: int
    ):
        super().__init__(
            backbone,
            (image_depth, GatedPrompts(image_length, rank, bias=-4.0)),
            (text_depth, GatedPrompts(text_length, rank, bias=-2.0)),
        )
        self.lengths = {"image": image_length, "text": text_length}
        self.rank = rank

    @staticmethod
    def is_trained(name: str) -> bool:
        return not name.endswith((".fixed_down", ".cls_mean", ".cls_variance"))

    def sums(self, parameters: Parameters, batch: TrainingBatch) -> Parameters:
        """Sums of the [CLS] scores of each image block and of their squares, [h, P] each, and the number of images."""
        tower = self.backbone.image
        record: list[Tensor] = []
        recording = GatedPrompts(self.lengths["image"], self.rank, bias=-4.0, record=record)
        residual = self._residual(tower, parameters, 1.0)
        self.backbone.encode_image(batch.images, Residual(recording, residual.layers, 1.0))
        found: Parameters = {"count": torch.tensor(float(len(batch.images)))}
        for layer, scores in enumerate(record):
            found[f"{layer}.sum"] = scores.double().sum(0)
            found[f"{layer}.squares"] = scores.double().square().sum(0)
        return found

    def finish(self, parameters: Parameters, sums: Parameters) -> Parameters:
        found = dict(parameters)
        for layer in range(self.depth["image"]):
            mean = sums[f"{layer}.sum"] / sums["count"]
            found[f"image.layer{layer}.cls_mean"] = mean.float()
            found[f"image.layer{layer}.cls_variance"] = (sums[f"{layer}.squares"] / sums["count"] - mean**2).float()
        return found
