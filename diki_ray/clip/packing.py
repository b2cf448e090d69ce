"""Several texts in a row, so that what all of them begin with is computed once a row and not once a text.

Attention is causal: the tokens of "a photo of a" have the same activations whatever follows. A row holds the shared
beginning and then the rest of up to `TEXTS_A_ROW` texts, each token at its position in its own text; a mask lets it see
the beginning and its own text up to itself:

    a photo of a | red panda <end> | heron <end> | ...

Exact to float32 rounding. In longer rows attention costs more than the beginning saves.

Shapes: C texts of L tokens, P of them shared, N rows of G texts and W = P + G (L − P) tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TEXTS_A_ROW = 8
WORTH_SHARING = 0.25
"""The share of a text's tokens from which on the beginning is shared."""


@dataclass(frozen=True)
class Rows:
    tokens: Tensor  # int64 [N, W]
    positions: Tensor  # int64 [W], of each token in its own text
    visible: Tensor  # bool [W, W], what a token (first axis) may see, as far as its position allows
    ends: Tensor  # int64 [N, G], where in its row each text is read; the last text fills the last row up


def packed(tokens: Tensor, ends: Tensor, texts_a_row: int = TEXTS_A_ROW) -> Rows:
    """Texts [C, L], whose features are read at `ends` [C], in rows; of one text each where they begin differently."""
    num_texts, length = tokens.shape
    shared = min(int((tokens == tokens[0]).all(0).cumprod(0).sum()), int(ends.min()))
    if shared < WORTH_SHARING * length:
        texts_a_row = 1
    num_rows = math.ceil(num_texts / texts_a_row)
    a_row = math.ceil(num_texts / num_rows)
    chosen = torch.arange(num_rows * a_row, device=tokens.device).clamp(max=num_texts - 1)
    own, text = length - shared, torch.arange(a_row, device=tokens.device)
    owner = torch.cat([text.new_full((shared,), -1), text.repeat_interleave(own)])
    position = torch.arange(length, device=tokens.device)
    return Rows(
        tokens=torch.cat(
            [tokens[:1, :shared].expand(num_rows, -1), tokens[chosen, shared:].reshape(num_rows, -1)], dim=1
        ),
        positions=torch.cat([position[:shared], position[shared:].repeat(a_row)]),
        visible=(owner == owner[:, None]) | (owner == -1),
        ends=ends[chosen].reshape(num_rows, a_row) + own * text,
    )
