"""Residual branches from outside the frozen model: what a task adds beside the frozen parts of a tower.

DIKI (arXiv 2407.05342), for a block with frozen projections:

    out = W_o · concat_heads( softmax(q kᵀ/√d + mask) v  +  w · softmax(q P_kᵀ/√d) P_v ) + b_o

Two separate softmaxes: the prompts never enter the frozen attention's normaliser. The branch is added by replacing the
`forward` of each block's attention and MLP on the instance: state-dict keys and the library's code stay as they are,
and the query projection is computed once for both terms. With no branch active the original `forward` runs. How each
library's attention is taken apart is in attention.py.

Shapes: B batch, L tokens, D width, h heads, d = D / h, P prompts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diki_ray.clip.attention import Attention, Inputs

Parameters = dict[str, Tensor]
"""A task's tensors by name: `{tower}.layer{l}.{tensor}`, as in `image.layer0.keys`."""


@dataclass(frozen=True)
class Block:
    """What a branch may need to know of the frozen block that it starts beside."""

    attention: Attention
    mlp_width: int
    """The hidden layer has this width; 0 where the block has no MLP of a known form."""

    @property
    def width(self) -> int:
        return self.attention.width

    def projections(self) -> tuple[Tensor, Tensor, Tensor]:
        """W_q, W_k, W_v, each [D, h · d] so that q = x W_q + b; float32 on the CPU."""
        q, k, v = self._matrices(self.attention.linear)
        return q, k, v

    def output(self) -> Tensor:
        """W_out [h · d, D] of the output projection, likewise."""
        return self._matrices(lambda joined: (self.attention.out(joined),))[0]

    def _matrices(self, linear: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
        like = next(p for p in self.attention.module.parameters() if p.dim() > 1)
        with torch.no_grad():
            bias = linear(torch.zeros_like(like[:1, :1]).expand(1, self.width))
            images = linear(torch.eye(self.width, dtype=like.dtype, device=like.device))
        return [(w.float() - b.float()).cpu() for w, b in zip(images, bias, strict=True)]


@dataclass(frozen=True)
class Heads:
    """What the heads of a block's attention are computed from."""

    x: Tensor  # [B, L, D], normalised input of the block; of the last block of some towers, those that are read
    q: Tensor  # [B, h, L, d], so that the scores are q kᵀ/√d; keys and values likewise
    k: Tensor
    v: Tensor
    inputs: Inputs
    """The mask, and what else the library's attention was called with."""
    frozen: Callable[[], Tensor]
    """[B, h, L, d], before the output projection."""


class ResidualBranch:
    """The form of what a task adds in one block. Tensors are of this block, each shared or with a leading batch
    dimension; the weight is a number or [B]; at weight 0 a branch changes nothing."""

    by_token: ClassVar[bool] = True
    """What is added to a token depends on no other token but through keys and values: the last block can then be
    computed for the tokens that are read alone, and several texts stand in one row."""
    parts: ClassVar[tuple[str, ...]] = ()
    """The parts of a block whose outputs `part` changes: linear layers `q`, `k`, `v`, `out`, `fc1`, `fc2`, or all of
    the `attention` or of the `mlp`."""

    def initial(self, block: Block, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors of one block before training."""
        raise NotImplementedError

    def heads(self, heads: Heads, tensors: dict[str, Tensor], weight: float | Tensor) -> Tensor:
        """[B, h, L, d], what goes into the output projection."""
        return heads.frozen()

    def part(self, name: str, x: Tensor, y: Tensor, tensors: dict[str, Tensor], weight: float | Tensor) -> Tensor:
        """What comes out of a part in `parts` where the frozen one gives y [B, L, …] for x [B, L, …]."""
        return y


class ResidualTerm(ResidualBranch):
    """A branch that is one term beside the frozen attention: heads = frozen + w · term."""

    def heads(self, heads: Heads, tensors: dict[str, Tensor], weight: float | Tensor) -> Tensor:
        out = heads.frozen()
        term = self.term(heads, tensors)
        return out + per_image(weight, term) * term

    @abstractmethod
    def term(self, heads: Heads, tensors: dict[str, Tensor]) -> Tensor:
        """[B, h, L, d], added before the output projection."""


@dataclass(frozen=True)
class PromptAttention(ResidualTerm):
    """softmax(q P_kᵀ/√d) P_v over `length` prompt keys and values of this task, no mask, not projected."""

    length: int

    def initial(self, block: Block, generator: torch.Generator) -> dict[str, Tensor]:
        keys = torch.rand(self.length, block.width, generator=generator) * 2 - 1
        return {"keys": keys, "values": torch.zeros(self.length, block.width)}

    def term(self, heads: Heads, tensors: dict[str, Tensor]) -> Tensor:
        q = heads.q
        keys, values = (split_heads(tensors[name].to(q.dtype), q) for name in ("keys", "values"))
        return F.scaled_dot_product_attention(q, keys, values)


def split_heads(prompts: Tensor, q: Tensor) -> Tensor:
    """[P, D] or [B, P, D] -> [B, h, P, d], without copying shared prompts."""
    batch, heads, _, width = q.shape
    shaped = prompts.unflatten(-1, (heads, width)).transpose(-3, -2)
    return shaped.expand(batch, -1, -1, -1)


def per_image(weight: float | Tensor, like: Tensor) -> float | Tensor:
    """The weight (a number or [B]) so that it multiplies [B, …]."""
    return weight.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1)) if isinstance(weight, Tensor) else weight


@dataclass(frozen=True)
class Residual:
    """What is active in a tower for one call: a branch, the tensors of each block, and the weight (scalar or [B])."""

    branch: ResidualBranch
    layers: list[dict[str, Tensor]]
    weight: float | Tensor = 1.0

    @property
    def same_for_all(self) -> bool:
        """Whether rows of a batch may stand in one row: no weight of their own, no look at other tokens."""
        return self.branch.by_token and not (isinstance(self.weight, Tensor) and self.weight.numel() > 1)

    def part(self, name: str, layer: int, x: Tensor, y: Tensor) -> Tensor:
        if name not in self.branch.parts:
            return y
        return self.branch.part(name, x, y, self.layers[layer], self.weight)


class Tower:
    """One frozen transformer with a place for a residual branch in each of its blocks."""

    def __init__(self, name: str, blocks: list[tuple[nn.Module, Attention]]):
        self.name = name
        self.num_blocks = len(blocks)
        self.blocks: list[Any] = [block for block, _ in blocks]
        self.attentions = [attention for _, attention in blocks]
        self.width: int = self.attentions[0].width
        # Both stay set after a forward pass: activation checkpointing runs the blocks again during backward.
        self.active = None
        self.can_read_alone = False
        """Whether the last block can be asked for the tokens that are read alone (`clip/readout.py`)."""
        self._mlps = [_mlp_of(block) for block, _ in blocks]
        for index, attention in enumerate(self.attentions):
            attention.module.forward = self._with_residual(index, attention)
            batch_first = getattr(attention.module, "batch_first", True)
            for part, module in self._mlps[index].items():
                module.forward = self._changed(part, index, module, batch_first)

    @property
    def active(self) -> Residual | None:
        return self._active

    @active.setter
    def active(self, residual: Residual | None) -> None:
        """A new pass begins, of all tokens until `read_at` says otherwise."""
        self._active = residual
        self.read_at: Tensor | None = None

    def begin(self, residual: Residual | None, read_at: Tensor) -> bool:
        """A new pass begins of which some tokens are read, read_at int64 [B, R]. True: the last block returns them
        alone, [B, R, D]."""
        self.active = residual
        if self.can_read_alone and (residual is None or residual.branch.by_token):
            self.read_at = read_at
        return self.read_at is not None

    def block(self, index: int) -> Block:
        fc1: Any = self._mlps[index].get("fc1")
        return Block(self.attentions[index], fc1.out_features if fc1 is not None else 0)

    def has(self, part: str) -> bool:
        """Whether all blocks have a part of that name."""
        return part in ("q", "k", "v", "out", "attention") or all(part in mlp for mlp in self._mlps)

    def _with_residual(self, index: int, attention: Attention) -> Callable:
        frozen = attention.module.forward
        gain = attention.query_gain

        def forward(*args: Any, **options: Any) -> Any:
            active = self.active
            if active is None or index >= len(active.layers):
                return frozen(*args, **options)
            inputs = attention.read(*args, **options)
            x = inputs.x
            linear = zip("qkv", (x, inputs.seen, inputs.seen), attention.projected(inputs), strict=True)
            q, k, v = (active.part(name, index, given, y) for name, given, y in linear)
            q, k, v = attention.scored(q, k, v, inputs)
            heads = Heads(x, q if gain == 1 else q * gain, k, v, inputs, lambda: attention.attend(q, k, v, inputs))
            joined = attention.joined(active.branch.heads(heads, active.layers[index], active.weight), inputs)
            out = active.part("out", index, joined, attention.out(joined))
            return attention.returned(active.part("attention", index, x, out), inputs)

        return forward

    def _changed(self, part: str, index: int, module: nn.Module, batch_first: bool) -> Callable:
        frozen: Callable = module.forward

        def forward(x: Tensor) -> Tensor:
            active, y = self.active, frozen(x)
            if active is None or index >= len(active.layers) or part not in active.branch.parts:
                return y
            if batch_first:
                return active.part(part, index, x, y)
            return active.part(part, index, x.transpose(0, 1), y.transpose(0, 1)).transpose(0, 1)

        return forward


def _mlp_of(block: nn.Module) -> dict[str, nn.Module]:
    """The block's MLP and its two linear layers, as open_clip and timm name them; empty where there is none such."""
    mlp = getattr(block, "mlp", None)
    for names in (("c_fc", "c_proj"), ("fc1", "fc2")):
        layers = [getattr(mlp, name, None) for name in names]
        if isinstance(mlp, nn.Module) and all(isinstance(layer, nn.Linear) for layer in layers):
            return {"mlp": mlp, "fc1": layers[0], "fc2": layers[1]}  # type: ignore[dict-item]
    return {}
