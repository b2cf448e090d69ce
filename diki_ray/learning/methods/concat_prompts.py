"""Prompts in the attention's own softmax, everything else as DIKI: what DIKI removes, for comparison.

    out = W_o · concat_heads( softmax([q P_kᵀ/√d + log w, q kᵀ/√d + mask]) [P_v; v] ) + b_o

This is where prefix tuning (Li and Liang, ACL 2021), and after it DualPrompt (Wang et al., ECCV 2022, arXiv
2204.04799), put their keys and values; prompts in the input (L2P, arXiv 2112.08654) meet the same softmax. Prompts
take attention away from the tokens even where their values are zero: an untrained task changes the features, and that
is the interference. The integration weight enters as log w on the prompts' scores: w = 0 is the frozen model, w = 1
plain concatenation. That form of the weight is ours. Depth, length and recipe are DIKI's, for ViT-B/16 too: depth 8,
length 8 in both towers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Block, Heads, PromptAttention, ResidualBranch, split_heads
from diki_ray.errors import ConfigError
from diki_ray.learning.methods.residual import ResidualMethod


class ConcatenatedPrompts(ResidualBranch):
    """`length` prompt keys and values beside the tokens' own, in one softmax."""

    def __init__(self, length: int):
        self.length = length

    def initial(self, block: Block, generator: torch.Generator) -> dict[str, Tensor]:
        return PromptAttention(self.length).initial(block, generator)

    def heads(self, heads: Heads, tensors: dict[str, Tensor], weight: float | Tensor) -> Tensor:
        if heads.inputs.is_causal or "position_bias" in heads.inputs.options:
            raise ConfigError("method.name: concat_prompts needs attention whose mask is given as a tensor; use diki.")
        q = heads.q
        keys, values = (split_heads(tensors[name].to(q.dtype), q) for name in ("keys", "values"))
        batch, _, num_tokens, _ = q.shape
        log_weight = torch.as_tensor(weight, dtype=torch.float32, device=q.device).log().to(q.dtype)
        mask = _added(heads.inputs.mask, q, heads.k)
        prompts = log_weight.reshape(-1, 1, 1, 1).expand(batch, mask.shape[1], num_tokens, self.length)
        mask = torch.cat([prompts, mask], dim=-1)
        return F.scaled_dot_product_attention(
            q, torch.cat([keys, heads.k], dim=2), torch.cat([values, heads.v], dim=2), attn_mask=mask
        )


def _added(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """The tokens' mask as what is added to their scores, [B, 1 or h, L, L']."""
    if mask is None:
        mask = q.new_zeros(q.shape[2], k.shape[2])
    elif mask.dtype is torch.bool:
        mask = q.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    mask = mask.to(q.dtype)
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    return mask.expand(len(q), -1, -1, -1)


class ConcatPrompts(ResidualMethod):
    """Initial keys uniform in (−1, 1), values zero, as DIKI's; but not neutral."""

    name = "concat_prompts"
    version = 1
    summary = (
        "prompts in the attention's own softmax (Wang et al., DualPrompt, ECCV 2022, arXiv 2204.04799), switched on "
        "for an image as far as it looks like something learnt (Tang et al., ECCV 2024, arXiv 2407.05342)"
    )

    def __init__(self, backbone: Backbone, image_depth: int, image_length: int, text_depth: int, text_length: int):
        super().__init__(
            backbone, (image_depth, ConcatenatedPrompts(image_length)), (text_depth, ConcatenatedPrompts(text_length))
        )
