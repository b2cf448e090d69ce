"""The frozen attentions that a task can be put beside, taken apart: one adapter for each family, found by type.

Whatever the library, a self-attention is

    q, k, v = scored(linear(x))         projected; then normalised and rotated, where the tower does so
    context = attend(q, k, v)           of each head
    y       = returned(out(joined(context)))      joined: scaled heads, an inner norm, a gate; out: output projection

A task's term is added to the context. Each step repeats the operations of the frozen forward pass in their order, so
that nothing added gives the frozen answer bit for bit.

Shapes: B batch, L tokens, D width of x, h heads, d head width.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diki_ray.errors import ConfigError


@dataclass(frozen=True)
class Inputs:
    """What one call of an attention was given."""

    x: Tensor
    """[B, L, D]: the block's input, normalised where the block does so first; of the tokens that query."""
    mask: Tensor | None = None
    """Additive, or boolean with True where a token is seen; broadcastable to [B, h, L, L]."""
    rope: Tensor | None = None
    is_causal: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """The library's own attention function is given them."""
    keyed: Tensor | None = None
    """[B, L', D] where more tokens are seen than query (`TorchAttention` alone, see readout.py); None: x."""

    @property
    def seen(self) -> Tensor:
        return self.x if self.keyed is None else self.keyed


class Attention(ABC):
    """One frozen attention module, seen as its steps."""

    query_gain: float = 1.0
    """The frozen scores are query_gain · q kᵀ/√d: towers that do not divide by √d have √d here."""

    def __init__(self, module: Any, heads: int, head_width: int):
        self.module = module
        self.heads = heads
        self.head_width = head_width

    @property
    def width(self) -> int:
        """h · d: of all heads' queries, keys or values together."""
        return self.heads * self.head_width

    @abstractmethod
    def read(self, *args: Any, **options: Any) -> Inputs:
        """The arguments of the module's `forward`."""

    @abstractmethod
    def linear(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projections of x, each [B, L, h · d]."""

    def scored(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as they are scored, each [B, h, L, d]."""
        return self._heads(q), self._heads(k), self._heads(v)

    def projected(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The projections of what queries, [B, L, h · d], and of what is seen, both [B, L', h · d]."""
        return self.linear(inputs.x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """The context of each head, [B, h, L, d]."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask)

    def joined(self, context: Tensor, inputs: Inputs) -> Tensor:
        """[B, L, h · d]: what the output projection gets."""
        return context.transpose(1, 2).flatten(2)

    @abstractmethod
    def out(self, joined: Tensor) -> Tensor:
        """The output projection, [B, L, D]."""

    def returned(self, out: Tensor, inputs: Inputs) -> Any:
        """What the module's `forward` returns for this output."""
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class TorchAttention(Attention):
    """`torch.nn.MultiheadAttention`, as open_clip's own blocks have it."""

    def __init__(self, module: nn.MultiheadAttention):
        super().__init__(module, module.num_heads, module.head_dim)
        if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
            raise ConfigError("an attention whose keys and values are not its queries' input takes no prompts.")

    def read(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        **_: Any,
    ) -> Inputs:
        if key_padding_mask is not None:
            raise ConfigError("an attention called with key_padding_mask takes no prompts: give it an attn_mask.")
        mask = _of_heads(attn_mask, self.heads, inverted=True)
        if not self.module.batch_first:
            return Inputs(query.transpose(0, 1), mask)
        return Inputs(query, mask, keyed=None if key is query else key)

    def linear(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = F.linear(x, self.module.in_proj_weight, self.module.in_proj_bias).chunk(3, dim=-1)
        return q, k, v

    def projected(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        if inputs.keyed is None:
            return self.linear(inputs.x)
        width, weight, bias = self.width, self.module.in_proj_weight, self.module.in_proj_bias
        bias = [None, None] if bias is None else [bias[:width], bias[width:]]
        k, v = F.linear(inputs.keyed, weight[width:], bias[1]).chunk(2, dim=-1)
        return F.linear(inputs.x, weight[:width], bias[0]), k, v

    def out(self, joined: Tensor) -> Tensor:
        return self.module.out_proj(joined)

    def returned(self, out: Tensor, inputs: Inputs) -> tuple[Tensor, None]:
        return (out if self.module.batch_first else out.transpose(0, 1)), None


class OpenClipAttention(Attention):
    """open_clip's own `Attention`, in blocks with query and key norms, scaled heads or an inner norm."""

    def __init__(self, module: Any):
        super().__init__(module, module.num_heads, module.head_dim)
        if module.logit_scale is not None:
            raise ConfigError("scaled cosine attention takes no prompts (open_clip 3.3 cannot run it either).")

    def read(self, x: Tensor, attn_mask: Tensor | None = None) -> Inputs:
        return Inputs(x, _of_heads(attn_mask, self.heads, inverted=True))

    def linear(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = F.linear(x, self.module.in_proj_weight, self.module.in_proj_bias).chunk(3, dim=-1)
        return q, k, v

    def scored(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        return self.module.ln_q(self._heads(q)), self.module.ln_k(self._heads(k)), self._heads(v)

    def joined(self, context: Tensor, inputs: Inputs) -> Tensor:
        if self.module.head_scale is not None:
            context = context * self.module.head_scale
        return self.module.ln_inner(super().joined(context, inputs))

    def out(self, joined: Tensor) -> Tensor:
        return self.module.out_proj(joined)


def _of_heads(mask: Tensor | None, heads: int, inverted: bool) -> Tensor | None:
    """torch's [B·h, L, L] masks to [B, h, L, L]; inverted: boolean masks have True where a token is not seen."""
    if mask is None:
        return None
    if mask.dim() == 3:
        mask = mask.unflatten(0, (-1, heads))
    return ~mask if inverted and mask.dtype is torch.bool else mask


class TimmAttention(Attention):
    """timm's `Attention`, `EvaAttention` and `AttentionRope`: fused or separate projections, query and key norms,
    rotary positions, grouped keys and values, an inner norm and a gate; with and without torch's fused kernel."""

    def __init__(self, module: Any):
        super().__init__(module, module.num_heads, module.head_dim)

    def read(
        self, x: Tensor, *, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Inputs:
        return Inputs(x, attn_mask, rope, is_causal)

    def linear(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = self.module
        if m.qkv is None:
            return m.q_proj(x), m.k_proj(x), m.v_proj(x)
        if getattr(m, "q_bias", None) is None:
            qkv = m.qkv(x)
        else:
            bias = torch.cat((m.q_bias, m.k_bias, m.v_bias))
            qkv = m.qkv(x) + bias if m.qkv_bias_separate else F.linear(x, m.qkv.weight, bias)
        q, k, v = qkv.chunk(3, dim=-1)
        return q, k, v

    def scored(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        m = self.module
        q, k, v = m.q_norm(self._heads(q)), m.k_norm(self._heads(k)), self._heads(v)
        if inputs.rope is not None:
            q, k = (self._rotated(t, inputs.rope).type_as(v) for t in (q, k))
        if (groups := getattr(m, "num_kv_groups", 1)) > 1:
            k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        return q, k, v

    def _rotated(self, t: Tensor, rope: Tensor) -> Tensor:
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat

        prefix = self.module.num_prefix_tokens
        rotated = apply_rot_embed_cat(t[:, :, prefix:], rope, half=getattr(self.module, "rotate_half", False))
        return torch.cat([t[:, :, :prefix], rotated], dim=2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        if self.module.fused_attn:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask, is_causal=inputs.is_causal)
        from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask

        scores = (q * self.module.scale) @ k.transpose(-2, -1)
        bias = resolve_self_attn_mask(q.shape[2], scores, inputs.mask, inputs.is_causal)
        return maybe_add_mask(scores, bias).softmax(dim=-1) @ v

    def joined(self, context: Tensor, inputs: Inputs) -> Tensor:
        joined = super().joined(context, inputs)
        if (norm := getattr(self.module, "norm", None)) is not None:
            joined = norm(joined)
        if (gate := getattr(self.module, "gate", None)) is not None:
            joined = joined * gate(inputs.x).sigmoid()
        return joined

    def out(self, joined: Tensor) -> Tensor:
        return self.module.proj(joined)


class TimmRelativeAttention(TimmAttention):
    """timm's `RelPosAttention`: a bias by relative position on the scores."""

    def read(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Inputs:  # type: ignore[override]
        own = self.module.rel_pos
        return Inputs(x, shared_rel_pos if own is None else own.get_bias())


class HuggingFaceAttention(Attention):
    """transformers' self-attentions; scores and context come from the attention function that the model's
    configuration names (`sdpa`, `eager`, …)."""

    projections: ClassVar[tuple[str, str, str]]
    heads_name: ClassVar[str]
    output_projection: ClassVar[str | None] = None
    """None: the projection is in the module that follows."""

    def __init__(self, module: Any):
        heads = getattr(module, self.heads_name)
        query = getattr(module, self.projections[0])
        super().__init__(module, heads, query.out_features // heads)

    def read(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Inputs:
        kept = {n: v for n, v in options.items() if n not in ("encoder_hidden_states", "key_value_states", "cache")}
        return Inputs(hidden_states, attention_mask, options=kept)

    def linear(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (getattr(self.module, name)(x) for name in self.projections)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        m = self.module
        eager = sys.modules[_defining_class(m).__module__].eager_attention_forward
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(m.config._attn_implementation, eager)
        context, _ = attention(m, q, k, v, inputs.mask, dropout=0.0, scaling=m.scaling, **inputs.options)
        return context.transpose(1, 2)

    def out(self, joined: Tensor) -> Tensor:
        return joined if self.output_projection is None else getattr(self.module, self.output_projection)(joined)

    def returned(self, out: Tensor, inputs: Inputs) -> Any:
        return out, None


class BertAttention(HuggingFaceAttention):
    projections = ("query", "key", "value")
    heads_name = "num_attention_heads"


class M2M100Attention(HuggingFaceAttention):
    projections = ("q_proj", "k_proj", "v_proj")
    heads_name = "num_heads"
    output_projection = "out_proj"


class MT5Attention(HuggingFaceAttention):
    """Scores are not divided by √d and carry a bias by relative position, which the first block hands on."""

    projections = ("q", "k", "v")
    heads_name = "n_heads"
    output_projection = "o"

    def __init__(self, module: Any):
        super().__init__(module)
        self.query_gain = self.head_width**0.5

    def read(  # type: ignore[override]
        self, hidden_states: Tensor, mask: Tensor | None = None, position_bias: Tensor | None = None, **options: Any
    ) -> Inputs:
        if position_bias is None:
            length = hidden_states.shape[1]
            position_bias = (
                self.module.compute_bias(length, length, device=hidden_states.device)
                if self.module.has_relative_attention_bias
                else hidden_states.new_zeros(1, self.heads, length, length)
            )
        base = super().read(hidden_states, mask, **options)
        return Inputs(base.x, base.mask, options=base.options | {"position_bias": position_bias})

    def returned(self, out: Tensor, inputs: Inputs) -> Any:
        return out, inputs.options["position_bias"], None


FAMILIES: dict[str, Callable[[Any], Attention]] = {
    "torch.nn.modules.activation.MultiheadAttention": TorchAttention,
    "open_clip.transformer.Attention": OpenClipAttention,
    "timm.layers.attention.Attention": TimmAttention,
    "timm.layers.attention.AttentionRope": TimmAttention,
    "timm.models.eva.EvaAttention": TimmAttention,
    "timm.models.vision_transformer_relpos.RelPosAttention": TimmRelativeAttention,
    "transformers.models.bert.modeling_bert.BertSelfAttention": BertAttention,
    "transformers.models.roberta.modeling_roberta.RobertaSelfAttention": BertAttention,
    "transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaSelfAttention": BertAttention,
    "transformers.models.m2m_100.modeling_m2m_100.M2M100Attention": M2M100Attention,
    "transformers.models.mt5.modeling_mt5.MT5Attention": MT5Attention,
}
"""The names are those of the classes that define `forward`: no library is imported for a model that does not use it."""


def _defining_class(module: Any) -> type:
    return next(c for c in type(module).__mro__ if "forward" in vars(c))


def family_of(module: nn.Module) -> Callable[[Any], Attention] | None:
    """None: no attention, or one that is not known here."""
    owner = _defining_class(module)
    return FAMILIES.get(f"{owner.__module__}.{owner.__qualname__}")


def attention_blocks(tower: nn.Module) -> list[tuple[nn.Module, Attention]]:
    """The blocks of a tower, each with its attention: the first list of modules in which every item holds exactly one
    attention of a known family. Pooling by attention stands outside such a list. Empty: there is none.

    Raises:
        ConfigError: a known family with an option that leaves prompts no place.
    """
    for blocks in tower.modules():
        if isinstance(blocks, nn.ModuleList | nn.Sequential) and len(blocks):
            found = [[m for m in block.modules() if family_of(m) is not None] for block in blocks]
            if all(len(attentions) == 1 for attentions in found):
                adapters = [family_of(attentions[0])(attentions[0]) for attentions in found]  # type: ignore[misc]
                return list(zip(blocks, adapters, strict=True))
    return []
