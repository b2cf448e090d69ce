"""Both softmaxes of residual attention in one kernel (FlexAttention), a candidate beside the platform's two calls.

One attention has one normaliser a query, so each query is there twice: once for the frozen keys, once for the
prompts, and the block mask skips the tiles of the other's keys. Tested equal to the two calls on the CPU, where
FlexAttention runs its reference. It is not used in training before it wins on a card: this is what measures it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.timing import interleaved
from benchmarks.world import World


def two_calls(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, causal: bool = False) -> Tensor:
    """[B, h, L, d] of q, k, v [B, h, L, d] and prompts [B, h, P, d], at weight 1: as `Tower` does it."""
    frozen = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return frozen + F.scaled_dot_product_attention(q, prompt_k, prompt_v)


def mask_of(length: int, num_prompts: int, causal: bool, device: str) -> BlockMask:
    """Of 2·L queries and L + P keys."""

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (query < length) == (key < length)
        return same & ((key <= query) | (query >= length)) if causal else same

    return create_block_mask(seen, None, None, 2 * length, length + num_prompts, device=device)


def one_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    mask: BlockMask,
    attention: Any = flex_attention,
) -> Tensor:
    """Likewise; attention: `flex_attention`, or it compiled."""
    keys, values = torch.cat([k, prompt_k], dim=2), torch.cat([v, prompt_v], dim=2)
    frozen, prompted = attention(torch.cat([q, q], dim=2), keys, values, block_mask=mask).chunk(2, dim=2)
    return frozen + prompted


def attention(world: World, batch: int, rounds: int, num_prompts: int = 8) -> dict[str, Any]:
    """Forward and backward of one block's attention in the image tower on a CUDA card, of both forms.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    length = world.backbone.model.visual.positional_embedding.shape[0]
    heads = world.backbone.image.attentions[0].heads
    shape = (batch, heads, length, world.backbone.image.width // heads)
    q, k, v = (torch.randn(shape, device=world.device, dtype=world.backbone.dtype, requires_grad=True) for _ in "qkv")
    few = (batch, heads, num_prompts, shape[-1])
    pk, pv = (torch.randn(few, device=q.device, dtype=q.dtype, requires_grad=True) for _ in "kv")
    mask, compiled = mask_of(length, num_prompts, False, world.device), torch.compile(flex_attention)

    def two() -> Tensor:
        return two_calls(q, k, v, pk, pv)

    def one() -> Tensor:
        return one_call(q, k, v, pk, pv, mask, compiled)

    torch.testing.assert_close(one(), two(), atol=0.05, rtol=0.05)
    inputs = (q, k, v, pk, pv)
    seconds = interleaved(
        world.device,
        rounds,
        two_calls=lambda: torch.autograd.grad(two().sum(), inputs),
        one_call=lambda: torch.autograd.grad(one().sum(), inputs),
    )
    return {
        "batch": batch,
        "length": length,
        "two_calls_s": seconds["two_calls"],
        "one_call_s": seconds["one_call"],
        "ratio": seconds["two_calls"] / seconds["one_call"],
    }
