"""Each family of attention: nothing learnt is the plain model, only prompts get gradients, a task trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from backbone_table import BEGIN, END, PAGE, table
from tiny_families import backbone_of, build, images, plain_features, shrunk, tokens

from diki_ray.clip.attention import TorchAttention
from diki_ray.clip.backbone import Backbone, load
from diki_ray.clip.recomputation import recompute_activations
from diki_ray.clip.residual import Tower
from diki_ray.errors import ConfigError
from diki_ray.learning.methods import Diki
from diki_ray.learning.task_trainer import Recipe, TaskTrainer

transformers = pytest.importorskip("transformers", reason="Hugging Face text towers need the extra `hf`")

CUSTOM = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "open_clip": ("ViT-B-32", {}),
    "open_clip, custom blocks": ("ViT-B-32", CUSTOM),
    "open_clip, no causal mask": ("ViT-L-14-CLIPA", {}),
    "open_clip, CoCa": ("coca_ViT-B-32", {}),
    "timm, SigLIP": ("ViT-B-16-SigLIP", {}),
    "timm, SigLIP2": ("ViT-SO400M-16-SigLIP2-256", {}),
    "timm, EVA01": ("EVA01-g-14", {}),
    "timm, EVA02": ("EVA02-B-16", {}),
    "timm, EVA02 post-norm": ("EVA02-E-14", {}),
    "timm, Perception Encoder": ("PE-Core-B-16", {}),
    "timm, ViTamin": ("ViTamin-S", {}),
    "timm, relative positions": ("vit_relpos_medium_patch16_cls_224", {}),
    "transformers, BERT": ("roberta-ViT-B-32", {"hf_model_name": "bert"}),
    "transformers, RoBERTa": ("roberta-ViT-B-32", {}),
    "transformers, XLM-R": ("xlm-roberta-base-ViT-B-32", {}),
    "transformers, NLLB": ("nllb-clip-base-siglip", {}),
    "transformers, mT5": ("mt5-base-ViT-B-32", {}),
}


def model_of(family: str, folder: Path) -> Any:
    name, options = FAMILIES[family]
    config = shrunk(open_clip.get_model_config(name))
    config["text_cfg"] |= options
    if "hf_model_name" not in options:
        config["vision_cfg"] |= options
    return build(config, folder)


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> Backbone:
    return backbone_of(model_of(request.param, tmp_path), request.param)


def random_parameters(method: Diki) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    initial = method.initial(torch.Generator())
    return {name: 0.5 * torch.randn(p.shape, generator=generator) for name, p in initial.items()}


def whole(backbone: Backbone, method: Diki, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """Text features under the parameters by the library's own forward pass, all tokens."""
    backbone.text.active = method._residual(backbone.text, parameters, 1.0)
    return plain_features(backbone.model, tokens(backbone.model), "text")


def assert_same(tower: Tower, features: torch.Tensor, plain: torch.Tensor) -> None:
    """Bit for bit; to rounding where the plain model has torch's MultiheadAttention, which multiplies the same numbers
    in another order when it knows that it is asked for a self-attention without gradients."""
    if isinstance(tower.attentions[0], TorchAttention):
        torch.testing.assert_close(features, plain, atol=1e-6, rtol=0)
    else:
        assert (features - plain).abs().max() == 0


def test_an_untrained_module_is_the_plain_model_bit_for_bit(backbone: Backbone) -> None:
    method = Diki(backbone, 2, 3, 2, 3)
    untrained, trained = method.initial(torch.Generator().manual_seed(0)), random_parameters(method)
    for tower, batch, features in (
        (backbone.image, images(), method.image_features),
        (backbone.text, tokens(backbone.model), method.text_features),
    ):
        plain = plain_features(backbone.model, batch, tower.name)
        with torch.no_grad():
            assert torch.equal(features(batch, untrained), features(batch, trained, 0.0))
            assert (features(batch, trained) - plain).abs().max() > 1e-4
            tower.active = method._residual(tower, untrained, 1.0)
        assert_same(tower, plain_features(backbone.model, batch, tower.name), plain)


def test_text_is_trimmed_only_where_that_changes_nothing(backbone: Backbone) -> None:
    method = Diki(backbone, 2, 3, 2, 3)
    parameters = random_parameters(method)
    texts = tokens(backbone.model)
    length = backbone._needed_length(texts)
    assert length == (texts.shape[1] if backbone.trimming == "off" else 7)
    with torch.no_grad():
        trimmed = method.text_features(texts, parameters)
    torch.testing.assert_close(trimmed, whole(backbone, method, parameters), atol=1e-6, rtol=0)


def test_only_prompts_get_gradients_and_a_task_trains(backbone: Backbone) -> None:
    method = Diki(backbone, 2, 3, 2, 3)
    parameters = {name: p.requires_grad_() for name, p in random_parameters(method).items()}
    logits = backbone.logits(
        method.image_features(images(), parameters), method.text_features(tokens(backbone.model), parameters)
    )
    torch.nn.functional.cross_entropy(logits, torch.arange(3)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    assert all(p.grad is None for p in backbone.model.parameters())

    initial = method.initial(torch.Generator().manual_seed(0))
    trainer = TaskTrainer(method, tokens(backbone.model), Recipe("adamw", lr=0.005), 40, initial)
    losses = [trainer.step(images(), torch.arange(3)).loss for _ in range(40)]
    assert losses[-1] < losses[0] - 0.02


def test_recomputed_activations_give_the_same_gradients_and_keep_less(backbone: Backbone) -> None:
    method = Diki(backbone, 2, 3, 2, 3)
    initial = random_parameters(method)

    def step() -> tuple[list[torch.Tensor], int]:
        parameters = {name: p.clone().requires_grad_() for name, p in initial.items()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.numel() and not isinstance(tensor, torch.nn.Parameter):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            text = method.text_features(tokens(backbone.model), parameters)
            logits = backbone.logits(method.image_features(images(), parameters), text)
            loss = torch.nn.functional.cross_entropy(logits, torch.arange(3))
        return list(torch.autograd.grad(loss, list(parameters.values()))), sum(kept.values())

    plain, kept = step()
    for tower in backbone.towers:
        recompute_activations(tower)
    recomputed, kept_then = step()
    for a, b in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert kept_then < 0.7 * kept


def test_each_image_of_a_mixed_batch_is_answered_as_alone(backbone: Backbone) -> None:
    method = Diki(backbone, 2, 3, 2, 3)
    parameters = [random_parameters(method), {n: -p for n, p in random_parameters(method).items()}]
    index, weight = torch.tensor([1, 0, 1]), torch.tensor([0.2, 1.0, 0.7])
    gathered = {n: torch.stack([p[n] for p in parameters])[index] for n in parameters[0]}
    with torch.no_grad():
        mixed = method.image_features(images(), gathered, weight)
        alone = [method.image_features(images()[i : i + 1], parameters[index[i]], float(weight[i])) for i in range(3)]
    torch.testing.assert_close(mixed, torch.cat(alone), atol=2e-6, rtol=0)


def test_half_precision_is_the_same_model(backbone: Backbone) -> None:
    method = Diki(backbone, 2, 3, 2, 3)
    parameters = random_parameters(method)
    with torch.no_grad():
        single = method.image_features(images(), parameters), method.text_features(tokens(backbone.model), parameters)
        digest = backbone.digest()
        backbone.to("cpu", torch.bfloat16)
        assert backbone.dtype is torch.bfloat16
        assert {p.dtype for n, p in backbone.model.named_parameters() if n not in ("logit_scale", "logit_bias")} == {
            torch.bfloat16  # CUDA's layer norm refuses weights in another dtype than that of what it normalises
        }
        assert backbone.model.logit_scale.dtype is torch.float32
        assert backbone.digest() == digest
        half = method.image_features(images(), parameters), method.text_features(tokens(backbone.model), parameters)
    for a, b in zip(single, half, strict=True):
        assert (a * b).sum(1).min() > 0.99


@pytest.mark.parametrize("family", ["timm, SigLIP", "timm, EVA02", "timm, relative positions", "transformers, BERT"])
def test_without_torchs_fused_kernel_it_is_the_plain_model_too(family: str, tmp_path: Path) -> None:
    fused = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        model = model_of(family, tmp_path)
    finally:
        timm.layers.set_fused_attn(fused)
    if family.startswith("transformers"):
        model.text.transformer.set_attn_implementation("eager")
    test_an_untrained_module_is_the_plain_model_bit_for_bit(backbone_of(model))


def test_siglips_logits_are_open_clips(tmp_path: Path) -> None:
    model = model_of("timm, SigLIP", tmp_path)
    assert model.logit_bias is not None
    with torch.no_grad():
        model.logit_bias.fill_(-3.0)
        expected, _ = model.get_logits(images(), tokens(model))
        backbone = backbone_of(model)
        logits = backbone.logits(backbone.encode_image(images()), backbone.encode_text(tokens(model)))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_the_digest_tells_weights_and_architecture_apart(tmp_path: Path) -> None:
    first, again = (backbone_of(model_of("timm, SigLIP", tmp_path)) for _ in range(2))
    assert first.digest() == again.digest()
    with torch.no_grad():
        again.model.visual.trunk.blocks[0].attn.qkv.weight[0, 0] += 1e-3
    assert first.digest() != again.digest()
    assert first.digest() != backbone_of(model_of("timm, SigLIP2", tmp_path)).digest()


def test_scaled_cosine_attention_is_refused_with_a_sentence(tmp_path: Path) -> None:
    config = shrunk(open_clip.get_model_config("ViT-B-32"))
    config["vision_cfg"]["scaled_cosine_attn"] = True
    with pytest.raises(ConfigError, match="scaled cosine attention takes no prompts"):
        backbone_of(build(config, tmp_path))


def test_a_folder_with_configuration_weights_and_tokenizer_is_a_backbone(tmp_path: Path) -> None:
    """open_clip's own layout, as its hub repositories have it; nothing is downloaded."""
    import json

    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "clip"
    folder.mkdir()
    config = shrunk(open_clip.get_model_config("ViT-L-14-CLIPA"))
    config["text_cfg"]["tokenizer_kwargs"] = {}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    with pytest.raises(ConfigError, match=r"could not be loaded .* the weights beside it"):
        load(f"local-dir:{folder}")
    model = build(config, tmp_path)
    save_file({n: p.contiguous() for n, p in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    with pytest.raises(ConfigError, match=r"its tokenizer .* could not be loaded"):
        load(f"local-dir:{folder}")

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "photo", "of", "cat", "dog"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    backbone = load(f"local-dir:{folder}")
    texts = backbone.tokenize(["cat", "dog"], "a photo of a {}")
    assert texts[:, :6].tolist() == [[2, 3, 4, 2, 5, 0], [2, 3, 4, 2, 6, 0]]
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode_text(texts), plain_features(model, texts, "text"))

    by_name = load_tokenizer_from(folder)
    assert by_name(["a dog"])[0, :3].tolist() == [2, 6, 0]


def load_tokenizer_from(folder: Path) -> Any:
    from diki_ray.clip.backbone import _tokenizer

    return _tokenizer("ViT-B-16-SigLIP", str(folder))


def test_the_table_in_the_docs_is_what_open_clips_models_do(tmp_path: Path) -> None:
    shown = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    assert shown == table(tmp_path), "run python tests/support/backbone_table.py"
