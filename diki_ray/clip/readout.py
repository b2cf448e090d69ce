"""The last block for the tokens that are read alone: of a tower whose feature is one token's (the class token, the end
of text), the other tokens' queries, output projections and MLPs in the last block change nothing.

Keys and values are still those of all tokens, so the feature is exact to float32 rounding. It saves about 5/6 of one
block, forward and backward. Only open_clip's own pre-norm block is done so; other towers compute all tokens.

Shapes: B batch, L tokens, R of them read (one but for packed texts), D width, h heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diki_ray.clip.light_import import open_clip
from diki_ray.clip.residual import Tower


def reads_class_token(visual: Any) -> bool:
    """Whether an image tower's feature is that of token 0 and nothing else of the last block's output."""
    return (
        type(visual) is open_clip.transformer.VisionTransformer
        and visual.pool_type == "tok"
        and visual.attn_pool is None
        and not visual.output_tokens
    )


def read_alone(tower: Tower) -> None:
    """From now on the tower's last block can be asked, by `Tower.read_at`, for the tokens that are read alone. Towers
    of other blocks are left as they are (`Tower.can_read_alone` stays False)."""
    block = tower.blocks[-1]
    if (
        type(block) is not open_clip.transformer.ResidualAttentionBlock
        or hasattr(block, "ln_1_kv")
        or not block.attn.batch_first
    ):
        return
    whole, heads = block.forward, block.attn.num_heads

    def forward(x: Tensor, k_x: None = None, v_x: None = None, attn_mask: Tensor | None = None) -> Tensor:
        at = tower.read_at
        if at is None:
            return whole(x, k_x, v_x, attn_mask=attn_mask)
        rows = torch.arange(len(x), device=x.device)[:, None]
        if attn_mask is not None:
            attn_mask = attn_mask.to(x.dtype)[at].repeat_interleave(heads, dim=0)  # [B·h, R, L]
        seen = block.ln_1(x)
        attended = block.attn(seen[rows, at], seen, seen, need_weights=False, attn_mask=attn_mask)[0]
        x = x[rows, at] + block.ls_1(attended)
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    block.forward = forward
    tower.can_read_alone = True
