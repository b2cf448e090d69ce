"""The residual branch leaves the frozen model alone, is the formula, and answers mixed batches image by image."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
from golden import Golden

from diki_ray.clip.backbone import Backbone, load
from diki_ray.errors import ConfigError
from diki_ray.learning.methods import Diki

GOLDEN = Golden.load()
IMAGES = GOLDEN["task0.test.images"]


def plain_features(images: torch.Tensor) -> torch.Tensor:
    """open_clip's own forward pass, with no branch of ours active."""
    GOLDEN.backbone.image.active = None
    with torch.no_grad():
        return GOLDEN.backbone.model.encode_image(images, normalize=True)


def random_parameters(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    initial = GOLDEN.method.initial(generator)
    return {n: torch.randn(p.shape, generator=generator) * 0.3 for n, p in initial.items()}


def test_untrained_module_adds_exactly_zero() -> None:
    untrained = GOLDEN.method.initial(torch.Generator().manual_seed(0))
    with torch.no_grad():
        with_branch = GOLDEN.method.image_features(IMAGES, untrained, 1.0)
        at_zero = GOLDEN.method.image_features(IMAGES, random_parameters(1), 0.0)
        text = GOLDEN.method.text_features(GOLDEN["task0.tokens"], untrained, 1.0)
        text_at_zero = GOLDEN.method.text_features(GOLDEN["task0.tokens"], random_parameters(1), 0.0)
    assert torch.equal(with_branch, at_zero)
    assert torch.equal(text, text_at_zero)
    torch.testing.assert_close(with_branch, plain_features(IMAGES), atol=1e-6, rtol=0)


def test_branch_is_the_papers_formula_in_one_block() -> None:
    """The attention of the first block, recomputed from the weights with two explicit softmaxes."""
    attention = GOLDEN.backbone.model.visual.transformer.resblocks[0].attn
    d, h = attention.embed_dim, attention.num_heads
    x = torch.randn(2, 5, d, generator=torch.Generator().manual_seed(0))
    parameters = random_parameters(2)
    keys, values = parameters["image.layer0.keys"], parameters["image.layer0.values"]
    weight = torch.tensor([0.3, 0.8])

    def heads(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(*t.shape[:-1], h, d // h).transpose(-3, -2)

    q, k, v = (
        heads(t) for t in torch.nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).split(d, -1)
    )
    scale = 1 / math.sqrt(d // h)
    frozen = (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v
    residual = (q @ heads(keys).transpose(-1, -2) * scale).softmax(-1) @ heads(values)
    expected = attention.out_proj((frozen + weight.view(2, 1, 1, 1) * residual).transpose(1, 2).reshape(2, 5, d))

    GOLDEN.backbone.image.active = GOLDEN.method._residual(GOLDEN.backbone.image, parameters, weight)
    torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], expected, atol=1e-5, rtol=0)


def test_mixed_batch_equals_each_image_alone() -> None:
    parameters = [random_parameters(s) for s in range(3)]
    index = torch.tensor([2, 0, 1, 1])
    weight = torch.tensor([0.2, 0.9, 0.0, 1.0])
    gathered = {n: torch.stack([p[n] for p in parameters])[index] for n in parameters[0]}
    with torch.no_grad():
        mixed = GOLDEN.method.image_features(IMAGES[:4], gathered, weight)
        alone = [
            GOLDEN.method.image_features(IMAGES[n : n + 1], parameters[int(index[n])], float(weight[n]))
            for n in range(4)
        ]
    torch.testing.assert_close(mixed, torch.cat(alone), atol=1e-6, rtol=0)


def test_only_the_tasks_parameters_get_gradients() -> None:
    parameters = {n: p.requires_grad_() for n, p in random_parameters(3).items()}
    features = GOLDEN.method.image_features(IMAGES[:2], parameters)
    text = GOLDEN.method.text_features(GOLDEN["task0.tokens"], parameters)
    GOLDEN.backbone.logits(features, text).sum().backward()
    assert all(p.grad is not None for p in parameters.values())
    assert all(p.grad is None for p in GOLDEN.backbone.model.parameters())


def test_gradients_are_the_same_under_activation_checkpointing() -> None:
    def gradient() -> torch.Tensor:
        parameters = {n: p.requires_grad_() for n, p in random_parameters(4).items()}
        GOLDEN.method.image_features(IMAGES[:2], parameters).sum().backward()
        return parameters["image.layer0.keys"].grad  # type: ignore[return-value]

    plain = gradient()
    transformer = GOLDEN.backbone.model.visual.transformer
    transformer.grad_checkpointing = True
    GOLDEN.backbone.model.train()  # open_clip checkpoints only in training mode
    try:
        checkpointed = gradient()
    finally:
        transformer.grad_checkpointing = False
        GOLDEN.backbone.model.eval()
    torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=0)


def test_trimmed_text_equals_all_77_tokens() -> None:
    tokens = torch.cat([GOLDEN[f"task{t}.tokens"] for t in range(GOLDEN.num_tasks)])  # ends at different places
    model = GOLDEN.backbone.model
    GOLDEN.backbone.text.active = None
    with torch.no_grad():
        whole = model.encode_text(tokens, normalize=True)
        trimmed = GOLDEN.backbone.encode_text(tokens)
    assert GOLDEN.backbone._needed_length(tokens) < 20
    torch.testing.assert_close(trimmed, whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("changes", [{"no_causal_mask": True}, {"pool_type": "last"}])
def test_text_that_cannot_be_trimmed_exactly_is_left_alone(changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    text = {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1} | changes
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    model = open_clip.model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    backbone = Backbone(model, str, str)
    tokens = torch.tensor([[1, 2, 49, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    assert backbone._needed_length(tokens) == 12
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode_text(tokens), model.encode_text(tokens, normalize=True))


def test_both_layouts_of_attention_give_the_same() -> None:
    """open_clip builds batch-first attention; older files and other builds have the sequence first."""
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    first, second = (open_clip.model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text) for _ in range(2))
    second.load_state_dict(first.state_dict())
    for tower in (second.visual.transformer, second.transformer):
        tower.batch_first = False
        for block in tower.resblocks:
            block.attn.batch_first = False
    images = torch.randn(3, 3, 16, 16)
    features = []
    for model in (first, second):
        method = Diki(Backbone(model, str, str), 2, 3, 2, 3)
        generator = torch.Generator().manual_seed(1)
        parameters = {n: torch.randn(p.shape, generator=generator) for n, p in method.initial(generator).items()}
        features.append(method.image_features(images, parameters, torch.tensor([0.1, 0.5, 1.0])))
    torch.testing.assert_close(*features, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["RN50", "convnext_base"])
def test_towers_without_attention_are_refused_with_a_sentence(name: str) -> None:
    model = open_clip.create_model(name, pretrained=None)
    with pytest.raises(ConfigError, match=r"image tower has no stack of blocks .* choose a ViT CLIP"):
        Backbone(model, str, str, name)


def test_names_and_files_that_do_not_exist_are_refused_with_a_sentence(tmp_path) -> None:
    with pytest.raises(ConfigError, match="neither `embedded`, nor a Python file"):
        load("ViT-Z-99")
    with pytest.raises(ConfigError, match="there is no file"):
        load(str(tmp_path / "mine.py"))
    with pytest.raises(ConfigError, match="needs weights"):
        load("ViT-B-16")
    with pytest.raises(ConfigError, match="could not be loaded"):
        load("ViT-B-16", str(tmp_path / "no.safetensors"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="no function create"):
        load(str(tmp_path / "empty.py"))


def test_a_depth_the_tower_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.image_depth: 9 blocks"):
        Diki(GOLDEN.backbone, 9, 2, 1, 2)


def test_published_setting_has_163840_parameters() -> None:
    """Depth 8, length 8 in both towers of a ViT-B/16: 8·2·8·(768 + 512)."""
    with torch.device("meta"):
        model = open_clip.create_model("ViT-B-16", pretrained=None, device="meta")
    method = Diki(Backbone(model, str, str), 8, 8, 8, 8)
    assert sum(p.numel() for p in method.initial(torch.Generator()).values()) == 163_840
