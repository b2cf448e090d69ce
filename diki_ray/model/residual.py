"""Residual attention from outside the frozen model: what a task adds beside the frozen attention of a tower.

DIKI (arXiv 2407.05342), for a block with frozen projections:

    out = W_o · concat_heads( softmax(q kᵀ/√d + mask) v  +  w · softmax(q P_kᵀ/√d) P_v ) + b_o

Two separate softmaxes: the prompts never enter the frozen attention's normaliser. The branch is added by replacing the
`forward` of each block's attention on the instance: state-dict keys and the library's code stay as they are, and the
query projection is computed once for both terms. With no branch active the original `forward` runs. How each library's
attention is taken apart is in attention.py.

Shapes: B batch, L tokens, D width, h heads, d = D / h, P prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diki_ray.model.attention import Attention

Parameters = dict[str, Tensor]
"""A task's trainable tensors by name: `{tower}.layer{l}.{tensor}`, as in `image.layer0.keys`."""


class ResidualBranch(Protocol):
    """The form of the term that a task adds in one block; DIKI's prompt attention is the first implementation."""

    def initial(self, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors of one block before training; together they add exactly zero."""
        ...

    def term(self, x: Tensor, q: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """[B, h, L, d], added before the output projection. x: the block's normalised input [B, L, D]; q: its
        frozen queries [B, h, L, d]; tensors: of this block, each shared or with a leading batch dimension."""
        ...


@dataclass(frozen=True)
class PromptAttention:
    """softmax(q P_kᵀ/√d) P_v over `length` prompt keys and values of this task, no mask, not projected."""

    length: int

    def initial(self, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        keys = torch.rand(self.length, width, generator=generator) * 2 - 1
        return {"keys": keys, "values": torch.zeros(self.length, width)}

    def term(self, x: Tensor, q: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        keys, values = (_split_heads(tensors[name].to(q.dtype), q) for name in ("keys", "values"))
        return F.scaled_dot_product_attention(q, keys, values)


def _split_heads(prompts: Tensor, q: Tensor) -> Tensor:
    """[P, D] or [B, P, D] -> [B, h, P, d], without copying shared prompts."""
    batch, heads, _, width = q.shape
    shaped = prompts.unflatten(-1, (heads, width)).transpose(-3, -2)
    return shaped.expand(batch, -1, -1, -1)


@dataclass(frozen=True)
class Residual:
    """What is active in a tower for one call: a branch, the tensors of each block, and the weight (scalar or [B])."""

    branch: ResidualBranch
    layers: list[dict[str, Tensor]]
    weight: float | Tensor = 1.0


class Tower:
    """One frozen transformer with a place for a residual branch beside each of its attentions."""

    def __init__(self, name: str, blocks: list[tuple[nn.Module, Attention]]):
        self.name = name
        self.num_blocks = len(blocks)
        self.blocks: list[Any] = [block for block, _ in blocks]
        self.attentions = [attention for _, attention in blocks]
        self.width: int = self.attentions[0].width
        # Stays set after a forward pass: activation checkpointing runs the blocks again during backward.
        self.active: Residual | None = None
        for index, attention in enumerate(self.attentions):
            attention.module.forward = self._with_residual(index, attention)

    def _with_residual(self, index: int, attention: Attention) -> Callable:
        frozen = attention.module.forward
        gain = attention.query_gain

        def forward(*args: Any, **options: Any) -> Any:
            active = self.active
            if active is None or index >= len(active.layers):
                return frozen(*args, **options)
            inputs = attention.read(*args, **options)
            q, k, v = attention.scored(*attention.linear(inputs.x), inputs)
            out = attention.attend(q, k, v, inputs)
            term = active.branch.term(inputs.x, q if gain == 1 else q * gain, active.layers[index])
            weight = active.weight
            if isinstance(weight, Tensor):
                weight = weight.to(term.dtype).reshape(-1, 1, 1, 1)
            joined = attention.joined(out + weight * term, inputs)
            return attention.returned(attention.out(joined), inputs)

        return forward
