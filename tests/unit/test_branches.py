"""Each method's own form, by hand or by a property that only the right implementation has."""

from __future__ import annotations

import math

import torch
from golden import Golden

from diki_ray.clip.residual import Residual, per_image
from diki_ray.learning.methods import CAda, ConcatPrompts, Dpw
from diki_ray.learning.methods.base import Step
from diki_ray.learning.methods.dpw import capped

GOLDEN = Golden.load()
BACKBONE = GOLDEN.backbone
IMAGES = GOLDEN["task0.test.images"][:4]
TOKENS = GOLDEN["task0.tokens"]
STEP = Step(0, 10, 0.1, 0)


def random_parameters(method, seed: int, predecessor=None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    initial = method.initial(generator, predecessor)
    return {
        n: p + torch.randn(p.shape, generator=generator) * 0.3 if method.is_trained(n) else p
        for n, p in initial.items()
    }


@torch.no_grad()
def frozen() -> tuple[torch.Tensor, torch.Tensor]:
    return BACKBONE.encode_image(IMAGES), BACKBONE.encode_text(TOKENS)


def heads_of(t: torch.Tensor, h: int) -> torch.Tensor:
    return t.unflatten(-1, (h, -1)).transpose(-3, -2)


@torch.no_grad()
def test_at_weight_zero_every_branch_is_the_frozen_model_also_image_by_image() -> None:
    for method in (
        ConcatPrompts(BACKBONE, 2, 3, 2, 3),
        Dpw(BACKBONE, 2, 2, 2, 2, rank=3),
        CAda(BACKBONE, 2, 2, rank=2, scale=0.5, orthogonality=1.0),
    ):
        parameters = random_parameters(method, 0)
        image, text = frozen()
        torch.testing.assert_close(method.image_features(IMAGES, parameters, 0.0), image, atol=1e-6, rtol=0)
        torch.testing.assert_close(method.text_features(TOKENS, parameters, 0.0), text, atol=1e-6, rtol=0)
        weight = torch.tensor([0.0, 0.9, 0.3, 1.0])
        mixed = method.image_features(IMAGES, parameters, weight)
        alone = [method.image_features(IMAGES[n : n + 1], parameters, float(weight[n])) for n in range(4)]
        torch.testing.assert_close(mixed, torch.cat(alone), atol=1e-5, rtol=0)
        torch.testing.assert_close(mixed[0], image[0], atol=1e-6, rtol=0)
        assert (mixed[3] - image[3]).abs().max() > 1e-3
        several = {n: torch.stack([p] * 4) for n, p in parameters.items()}
        torch.testing.assert_close(method.image_features(IMAGES, several, weight), mixed, atol=1e-5, rtol=0)


@torch.no_grad()
def test_concatenated_prompts_share_the_softmax_and_interfere_untrained() -> None:
    """The attention of the first block, recomputed with one explicit softmax over prompts and tokens."""
    method = ConcatPrompts(BACKBONE, 1, 3, 1, 3)
    attention = BACKBONE.model.visual.transformer.resblocks[0].attn
    d, h, w = attention.embed_dim, attention.num_heads, 0.3
    x = torch.randn(2, 5, d, generator=torch.Generator().manual_seed(0))
    parameters = random_parameters(method, 1)
    q, k, v = (
        heads_of(t, h)
        for t in torch.nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).split(d, -1)
    )
    keys, values = (heads_of(parameters[f"image.layer0.{n}"], h).expand(2, -1, -1, -1) for n in ("keys", "values"))
    own = torch.exp(q @ k.transpose(-1, -2) / math.sqrt(d // h))
    extra = w * torch.exp(q @ keys.transpose(-1, -2) / math.sqrt(d // h))
    context = (own @ v + extra @ values) / (own.sum(-1, keepdim=True) + extra.sum(-1, keepdim=True))
    expected = attention.out_proj(context.transpose(1, 2).reshape(2, 5, d))
    BACKBONE.image.active = method._residual(BACKBONE.image, parameters, w)
    torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], expected, atol=1e-5, rtol=0)

    untrained = method.initial(torch.Generator().manual_seed(0))
    assert (method.image_features(IMAGES, untrained) - frozen()[0]).abs().max() > 1e-3


def test_the_gates_sum_is_capped_at_one_and_what_is_cut_off_weights_the_adapter() -> None:
    gates, excess = capped(torch.tensor([[0.25, 0.25], [1.0, 0.6]]))
    torch.testing.assert_close(gates, torch.tensor([[0.25, 0.25], [0.625, 0.375]]))
    torch.testing.assert_close(excess, torch.tensor([[0.0], [0.6]]))


@torch.no_grad()
def test_dpw_is_its_formula_in_one_block() -> None:
    method = Dpw(BACKBONE, 1, 2, 1, 2, rank=3)
    attention = BACKBONE.model.visual.transformer.resblocks[0].attn
    d, h = attention.embed_dim, attention.num_heads
    parameters = random_parameters(method, 2)
    p = {n.removeprefix("image.layer0."): t for n, t in parameters.items() if n.startswith("image.")}
    p["gate_bias"] += 6  # gates that pass the cap
    x = torch.randn(2, 5, d, generator=torch.Generator().manual_seed(0))
    branch = method.branch["image"]
    BACKBONE.image.active = Residual(branch, [p], 1.0)
    found = attention(x, x, x, need_weights=False)[0]
    BACKBONE.image.active = None
    plain = attention(x, x, x, need_weights=False)[0]
    term = torch.zeros(2, h, 5, d // h)
    adapter = 0.05 * (x @ p["fixed_down"] @ p["up"] + p["up_bias"])
    for head in range(h):
        columns = slice(head * d // h, (head + 1) * d // h)
        g = torch.sigmoid(x @ p["gate"][head] + p["gate_bias"][head])
        n = g.sum(-1, keepdim=True).clamp(min=1)
        assert (n > 1).any()
        term[:, head] = (g / n) @ p["values"][:, columns] + (n - 1) * adapter[..., columns]
    added = torch.nn.functional.linear(term.transpose(1, 2).flatten(2), attention.out_proj.weight)
    torch.testing.assert_close(found, plain + added, atol=1e-5, rtol=0)


@torch.no_grad()
def test_dpws_gates_start_as_left_singular_vectors_of_the_query_key_product() -> None:
    method = Dpw(BACKBONE, 1, 2, 0, 2, rank=3)
    attention = BACKBONE.model.visual.transformer.resblocks[0].attn
    d = attention.embed_dim
    w_q, w_k, _ = attention.in_proj_weight.split(d)
    gate = method.initial(torch.Generator())["image.layer0.gate"]  # [h, D, P]
    columns = gate.permute(1, 0, 2).flatten(1)
    product = w_q.T @ w_k  # x W_q W_kᵀ xᵀ, with torch's rows as outputs
    eigen = product @ product.T @ columns
    ratio = (columns * eigen).sum(0)
    torch.testing.assert_close(eigen, columns * ratio, atol=1e-4 * float(ratio.max()), rtol=0)
    assert torch.all(ratio[:-1] >= ratio[1:] - 1e-4 * ratio[0])


@torch.no_grad()
def test_dpw_cuts_gates_off_where_the_cls_score_is_unlike_the_tasks_own() -> None:
    method = Dpw(BACKBONE, 1, 2, 1, 2, rank=3)
    parameters = random_parameters(method, 3)
    branch = method.branch["image"]
    gates = torch.tensor([0.45, 0.55]).expand(1, 1, 1, 2)
    scores = torch.zeros(1, 1, 1, 2)
    tensors = {"cls_mean": torch.zeros(1, 2), "cls_variance": torch.full((1, 2), 1 / (2 * math.pi))}
    # log N(0; 0, 1/2π) = 0, so familiar = 1/2: the gate of 0.45 goes, that of 0.55 stays; not at w >= 0.825.
    assert branch._cut(gates, scores, tensors, 0.5).flatten().tolist() == torch.tensor([0.0, 0.55]).tolist()
    assert torch.equal(branch._cut(gates, scores, tensors, 0.9), gates)
    assert branch._cut(gates, scores + 9, tensors, 0.5).abs().max() == 0  # far from anything seen in training
    assert branch._cut(gates, scores, {}, 0.5).flatten().tolist()[0] == 0  # a text's gate stays above 1 − w
    assert parameters


def test_c_ada_grows_by_a_slice_whose_predecessors_are_frozen() -> None:
    method = CAda(BACKBONE, 2, 2, rank=2, scale=0.5, orthogonality=1.0)
    first = random_parameters(method, 0)
    start = method.initial(torch.Generator().manual_seed(1), first)
    with torch.no_grad():  # an untrained slice changes nothing of what is learnt
        torch.testing.assert_close(
            method.image_features(IMAGES, start), method.image_features(IMAGES, first), atol=1e-6, rtol=0
        )
    second = random_parameters(method, 1, first)
    third = method.initial(torch.Generator().manual_seed(2), second)
    width = BACKBONE.image.width
    assert third["image.layer0.old_down"].shape == (width, 4)
    assert torch.equal(third["image.layer0.old_down"][:, :2], first["image.layer0.down"])
    assert torch.equal(third["image.layer0.old_up"][2:], second["image.layer0.up"])
    assert torch.equal(third["image.layer0.old_gain"], first["image.layer0.gain"])
    trained = {n.rpartition(".")[2] for n in third if method.is_trained(n)}
    assert trained == {"down", "up"}


@torch.no_grad()
def test_c_ada_is_parallel_to_the_mlp() -> None:
    method = CAda(BACKBONE, 1, 0, rank=2, scale=0.5, orthogonality=1.0)
    second = random_parameters(method, 1, random_parameters(method, 0))
    p = {n.removeprefix("image.layer0."): t for n, t in second.items()}
    mlp = BACKBONE.model.visual.transformer.resblocks[0].mlp
    x = torch.randn(2, 5, BACKBONE.image.width, generator=torch.Generator().manual_seed(0))
    BACKBONE.image.active = None
    plain = mlp(x)
    BACKBONE.image.active = method._residual(BACKBONE.image, second, torch.tensor([1.0, 0.5]))
    seen = x * p["old_gain"] + p["old_shift"]
    adapted = sum(torch.relu(seen @ p[f"{o}down"]) @ p[f"{o}up"] for o in ("old_", ""))
    expected = plain + per_image(torch.tensor([1.0, 0.5]), x) * 0.5 * adapted
    torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=0)


def test_c_adas_orthogonal_loss_is_zero_for_slices_that_read_other_directions() -> None:
    method = CAda(BACKBONE, 1, 0, rank=1, scale=0.5, orthogonality=2.0)
    width = BACKBONE.image.width
    old, new = torch.zeros(width, 1), torch.zeros(width, 1)
    old[0], new[1] = 3.0, 4.0
    assert method.extra_loss({"image.layer0.down": new}, STEP) is None  # the first task
    assert method.extra_loss({"image.layer0.old_down": old, "image.layer0.down": new}, STEP) == 0
    new[0] = 1.0
    assert method.extra_loss({"image.layer0.old_down": old, "image.layer0.down": new}, STEP) == 2.0 * 3.0**2
