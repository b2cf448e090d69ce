"""Texts that begin alike stand in one row, and nothing but rounding changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_readout import METHODS, parameters_of

from benchmarks.world import World, one_text_a_row
from diki_ray.clip.packing import packed
from diki_ray.learning.methods import Dpw, Method

BACKBONE = METHODS[0].backbone
TOKENS = BACKBONE.tokenize(
    ["heron", "red panda", "very small glass bottle", "fox", "owl", "bee", "elm", "oak", "ash"], "a photo of a {}."
)


@given(
    beginning=st.lists(st.integers(1, 9), max_size=6),
    rests=st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=12),
    texts_a_row=st.integers(1, 5),
)
def test_what_a_text_sees_from_its_end_is_itself(
    beginning: list[int], rests: list[list[int]], texts_a_row: int
) -> None:
    texts = [[*beginning, *rest, 99] for rest in rests]
    length = max(map(len, texts))
    tokens = torch.tensor([text + [0] * (length - len(text)) for text in texts])
    rows = packed(tokens, torch.tensor([len(text) - 1 for text in texts]), texts_a_row)
    num_rows, num_ends = rows.ends.shape
    assert num_rows * num_ends < len(texts) + num_ends  # no row of fillings alone
    causal = rows.positions <= rows.positions[:, None]
    for c, text in enumerate(texts):
        row, end = c // num_ends, rows.ends[c // num_ends, c % num_ends]
        seen = (rows.visible[end] & causal[end]).nonzero().flatten()
        assert rows.positions[seen].tolist() == list(range(len(text)))
        assert rows.tokens[row, seen].tolist() == text
        # And the beginning, which others read too, sees nothing of this text.
        for token in seen.tolist():
            visible = (rows.visible[token] & causal[token]).nonzero().flatten()
            assert rows.positions[visible].tolist() == list(range(int(rows.positions[token]) + 1))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_features_and_gradients_are_those_of_a_row_for_each_text(method: Method) -> None:
    def features_and_gradients() -> tuple[torch.Tensor, ...]:
        parameters = {n: p for n, p in parameters_of(method).items() if n.startswith("text.")}
        features = method.text_features(TOKENS, parameters, 0.7)
        target = torch.randn(features.shape, generator=torch.Generator().manual_seed(4))
        return features, *torch.autograd.grad((features * target).sum(), list(parameters.values()), allow_unused=True)

    together = features_and_gradients()
    with one_text_a_row(BACKBONE):
        alone = features_and_gradients()
    for one, other in zip(together, alone, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_fewer_tokens_are_computed_but_where_texts_differ_in_more_than_their_names() -> None:
    seen: list[int] = []
    block = BACKBONE.model.transformer.resblocks[0]
    hook = block.mlp.register_forward_hook(lambda _, x, y: seen.append(y[..., 0].numel()))
    diki, dpw = METHODS[0], METHODS[-1]
    assert isinstance(dpw, Dpw)
    weights = torch.linspace(0, 1, len(TOKENS))
    others = torch.cat([TOKENS, BACKBONE.tokenize(["owl"], "sketch of the {}")])
    try:
        diki.text_features(TOKENS, parameters_of(diki))
        BACKBONE.encode_text(TOKENS)
        diki.text_features(TOKENS, parameters_of(diki), weights)  # each at a weight of its own
        dpw.text_features(TOKENS, parameters_of(dpw))  # the first token's scores decide for all of a row
        BACKBONE.encode_text(others)  # one begins otherwise
    finally:
        hook.remove()
    whole = BACKBONE._needed_length(TOKENS)
    assert seen[0] == seen[1] < 0.75 * len(TOKENS) * whole
    assert seen[2] == seen[3] == len(TOKENS) * whole
    assert seen[4] == len(others) * whole


def test_a_frozen_tower_gives_the_same_features() -> None:
    world = World.make("debug", "cpu")
    with torch.no_grad():
        together = world.backbone.encode_text(world.tokens(21))
        with one_text_a_row(world.backbone):
            torch.testing.assert_close(world.backbone.encode_text(world.tokens(21)), together, atol=1e-6, rtol=0)
