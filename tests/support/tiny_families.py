"""Every architecture of open_clip with its own options and tiny dimensions: nothing is downloaded, seconds in all."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from diki_ray.clip.backbone import Backbone

WIDTH, HEADS, LAYERS, IMAGE_PX, VOCABULARY, CONTEXT = 32, 2, 2, 32, 64, 12

HUGGING_FACE: dict[str, dict[str, Any]] = {
    name: {
        "model_type": name,
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": CONTEXT + 4,
    }
    for name in ("bert", "roberta", "xlm-roberta")
} | {
    "m2m_100": {
        "model_type": "m2m_100",
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "encoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "encoder_ffn_dim": 2 * WIDTH,
        "decoder_layers": 1,
        "decoder_attention_heads": HEADS,
        "decoder_ffn_dim": WIDTH,
        "max_position_embeddings": CONTEXT + 4,
    },
    "mt5": {
        "model_type": "mt5",
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": WIDTH // HEADS,
        "d_ff": 2 * WIDTH,
        "num_layers": LAYERS,
        "num_decoder_layers": 1,
        "num_heads": HEADS,
    },
}


def _hugging_face_type(name: str) -> str:
    kinds = {"xlm": "xlm-roberta", "roberta": "roberta", "nllb": "m2m_100", "mt5": "mt5", "bert": "bert"}
    return next(kind for part, kind in kinds.items() if part in name)


_create_timm_model = timm.create_model


def _tiny_timm_model(name: str, **options: Any) -> nn.Module:
    """The named timm model with its own options, but for sizes."""
    transformer = {"embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS, "img_size": IMAGE_PX}
    if name.startswith("vitamin"):
        from timm.models.vitamin import VitCfg, VitConvCfg

        conv = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
        stem = VitCfg(embed_dim=(8, 8, WIDTH), depths=(1, 1, 1), stem_width=8, conv_cfg=conv, head_type="1d")
        sizes = transformer | {"embed_cfg": stem}
    elif name == "vit_base_mci_224":  # its convolutional stem has a fixed width
        sizes = {"depth": LAYERS, "img_size": IMAGE_PX}
    elif name.startswith(("vit_", "eva")):
        sizes = transformer | {"patch_size": 8}
    elif name.startswith("convnext"):
        sizes = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    elif name.startswith("swin"):
        sizes = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    else:
        stages = 5 if name in ("fastvit_mci3", "fastvit_mci4") else 4
        sizes = {"layers": (1,) * stages, "embed_dims": (8, 8, 8, 32, 32)[:stages]}
    return _create_timm_model(name, **options, **sizes)


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """An open_clip configuration with every option kept and every size small."""
    config = copy.deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    config["embed_dim"] = WIDTH
    vision["image_size"] = IMAGE_PX
    if isinstance(vision.get("layers"), list):
        vision |= {"layers": [1, 1, 1, 1], "width": 8}
    elif "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    else:
        vision |= {"layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": 8, "mlp_ratio": 2}
    text |= {"context_length": CONTEXT, "vocab_size": VOCABULARY}
    if "hf_model_name" not in text:
        text |= {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "mlp_ratio": 2}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"width": WIDTH, "heads": HEADS, "layers": 1, "context_length": CONTEXT}
    return config


def build(config: dict[str, Any], folder: Path) -> nn.Module:
    """The model of a shrunk configuration, with random weights; `folder` gets Hugging Face's configuration files."""
    config = copy.deepcopy(config)
    text = config["text_cfg"]
    custom = config.pop("custom_text", False)
    if "hf_model_name" in text:
        custom = True
        kind = _hugging_face_type(text["hf_model_name"])
        path = folder / kind
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(HUGGING_FACE[kind]))
        text |= {"hf_model_name": str(path), "hf_model_pretrained": False}
    factory = open_clip.CoCa if custom and "multimodal_cfg" in config else open_clip.CustomTextCLIP
    torch.manual_seed(0)
    with mock.patch("timm.create_model", _tiny_timm_model):
        model: nn.Module = (factory if custom else open_clip.CLIP)(**config).eval()
    for name, parameter in model.named_parameters():
        if "gamma" in name:  # layer scales start at 1e-5, where no change of a block can be seen
            nn.init.constant_(parameter, 0.5)
    return model


def backbone_of(model: nn.Module, name: str = "tiny") -> Backbone:
    return Backbone(model, str, str, name)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, IMAGE_PX, IMAGE_PX, generator=torch.Generator().manual_seed(1))


def tokens(model: Any) -> Tensor:
    """[3, L]: texts of different lengths with the tower's own end and padding."""
    text = getattr(model, "text", model)
    hugging_face = isinstance(text, HFTextEncoder)
    padding = text.config.pad_token_id if hugging_face else 0
    pools_at = getattr(text, "pool_type", None) or getattr(text, "text_pool_type", None)
    end = getattr(text, "eos_id", None) or getattr(text, "text_eos_id", 2)
    rows = []
    for length in (3, 6, 4):
        words = torch.randint(5, VOCABULARY - 2, (length,), generator=torch.Generator().manual_seed(length))
        last = torch.tensor([VOCABULARY - 1 if pools_at == "argmax" else end])
        rows.append(torch.cat([words, last, torch.full((CONTEXT - length - 1,), padding)]))
    return torch.stack(rows)


def plain_features(model: Any, batch: Tensor, tower: str) -> Tensor:
    """The library's own forward pass, normalised."""
    with torch.no_grad():
        encode = model.encode_image if tower == "image" else model.encode_text
        return nn.functional.normalize(encode(batch).float(), dim=-1)
