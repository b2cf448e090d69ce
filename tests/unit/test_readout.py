"""The last block is computed for the one token that is read, where that changes nothing but rounding."""

from __future__ import annotations

import open_clip
import pytest
import torch
from golden import Golden

from benchmarks.world import World, all_tokens_in_the_last_block
from diki_ray.clip.backbone import Backbone
from diki_ray.clip.recomputation import recompute_activations
from diki_ray.learning.methods import CAda, ConcatPrompts, Diki, Dpw, Method
from diki_ray.learning.methods.low_rank import LowRankMethod

GOLDEN = Golden.load()
IMAGES = GOLDEN["task0.test.images"][:4]
TOKENS = torch.cat([GOLDEN[f"task{t}.tokens"] for t in range(GOLDEN.num_tasks)])  # they end at different places
WEIGHT = torch.tensor([0.0, 0.9, 0.3, 1.0])
DEPTH = GOLDEN.backbone.image.num_blocks
METHODS: list[Method] = [
    Diki(GOLDEN.backbone, DEPTH, 3, DEPTH, 3),
    ConcatPrompts(GOLDEN.backbone, DEPTH, 3, DEPTH, 3),
    CAda(GOLDEN.backbone, DEPTH, DEPTH, rank=2, scale=0.5, orthogonality=1.0),
    LowRankMethod(GOLDEN.backbone, 2, 1.0, None, None),
    Dpw(GOLDEN.backbone, DEPTH, 2, DEPTH, 2, rank=3),
]


def parameters_of(method: Method) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        n: (p + 0.3 * torch.randn(p.shape, generator=generator)).requires_grad_()
        for n, p in method.initial(generator).items()
    }


def features_and_gradients(method: Method) -> tuple[torch.Tensor, ...]:
    parameters = parameters_of(method)
    image, text = method.image_features(IMAGES, parameters, WEIGHT), method.text_features(TOKENS, parameters, 0.7)
    target = torch.randn(image.shape[1], generator=torch.Generator().manual_seed(4))
    gradients = torch.autograd.grad((image @ target).sum() + (text @ target).sum(), list(parameters.values()))
    return image, text, *gradients


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_features_and_gradients_are_those_of_all_tokens(method: Method) -> None:
    alone = features_and_gradients(method)
    with all_tokens_in_the_last_block(GOLDEN.backbone):
        whole = features_and_gradients(method)
    for one, every in zip(alone, whole, strict=True):
        torch.testing.assert_close(one, every, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_frozen_towers_are_open_clips() -> None:
    image, text = GOLDEN.backbone.encode_image(IMAGES), GOLDEN.backbone.encode_text(TOKENS)
    for tower in GOLDEN.backbone.towers:
        tower.active = None
    model = GOLDEN.backbone.model
    torch.testing.assert_close(image, model.encode_image(IMAGES, normalize=True), atol=1e-6, rtol=0)
    torch.testing.assert_close(text, model.encode_text(TOKENS, normalize=True), atol=1e-6, rtol=0)


@torch.no_grad()
def test_only_one_token_goes_through_the_last_mlp_but_for_a_branch_that_looks_at_others() -> None:
    seen: list[int] = []
    blocks = [GOLDEN.backbone.model.visual.transformer.resblocks[-1], GOLDEN.backbone.model.transformer.resblocks[-1]]
    hooks = [block.mlp.register_forward_hook(lambda _, x, y: seen.append(x[0].shape[1])) for block in blocks]
    try:
        features_of = METHODS[0], METHODS[-1]
        for method in features_of:
            method.image_features(IMAGES, parameters_of(method))
            method.text_features(TOKENS, parameters_of(method))
        GOLDEN.backbone.encode_image(IMAGES)
    finally:
        for hook in hooks:
            hook.remove()
    assert seen[:2] == [1, 1]
    assert min(seen[2:4]) > 1
    assert seen[4:] == [1]


def test_gradients_are_the_same_when_activations_are_computed_again() -> None:
    def gradients(recompute: bool) -> list[torch.Tensor]:
        world = World.make("debug", "cpu")
        if recompute:
            for tower in world.backbone.towers:
                recompute_activations(tower)
        parameters = {n: p.requires_grad_() for n, p in world.parameters(0).items()}
        first = world.method.text_features(world.tokens(3), parameters)
        world.method.text_features(world.tokens(5), parameters)  # another pass, of other texts, before the backward one
        image = world.method.image_features(world.images(2), parameters)
        return list(torch.autograd.grad((image @ first.T).sum(), list(parameters.values())))

    for kept, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(kept, again, atol=1e-6, rtol=0)


@pytest.mark.parametrize("vision", [{"pool_type": "avg"}, {"attentional_pool": True}, {"output_tokens": True}])
def test_a_tower_that_reads_more_than_one_token_is_left_alone(vision: dict) -> None:
    small = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    extra = {n: v for n, v in vision.items() if n != "output_tokens"}
    model = open_clip.model.CLIP(embed_dim=32, vision_cfg=small | extra, text_cfg=text)
    model.visual.output_tokens = vision.get("output_tokens", False)
    backbone = Backbone(model, lambda image: image, open_clip.SimpleTokenizer(context_length=77))
    assert not backbone.image.can_read_alone
    assert backbone.text.can_read_alone
