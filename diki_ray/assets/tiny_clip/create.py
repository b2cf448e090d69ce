"""The embedded tiny CLIP: open_clip's own towers, pre-trained on the embedded world (docs/embedded_world.md).

    model, preprocess, tokenizer = create(folder)
    image = model.encode_image(preprocess(picture)[None], normalize=True)
    text = model.encode_text(tokenizer(["a red star."]), normalize=True)
    logits = model.logit_scale.exp() * image @ text.T

A backbone folder is this file beside `config.json`, `model.safetensors` and `merges.txt.gz`; any other CLIP is brought
in the same way. Nothing is downloaded and nothing is unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision import transforms

CONFIG_FILE, WEIGHTS_FILE, MERGES_FILE = "config.json", "model.safetensors", "merges.txt.gz"
# Pixel values arrive in -1..1.
IMAGE_MEAN, IMAGE_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def build(config: dict[str, Any]) -> nn.Module:
    """The architecture with random weights; `config` holds the arguments of `open_clip.model.CLIP`."""
    model = open_clip.model.CLIP(**config)
    model.visual.image_mean, model.visual.image_std = IMAGE_MEAN, IMAGE_STD
    return model


def _to_rgb(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB")


def preprocessing(size_px: int) -> transforms.Compose:
    """PIL image of any size to a normalised float32 `[3, size_px, size_px]`."""
    return transforms.Compose(
        [
            _to_rgb,
            transforms.Resize(size_px, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size_px),
            transforms.ToTensor(),
            transforms.Normalize(IMAGE_MEAN, IMAGE_STD),
        ]
    )


def create(directory: str | Path) -> tuple[nn.Module, transforms.Compose, open_clip.SimpleTokenizer]:
    """(model in eval mode and float32 on the CPU, preprocess, tokenizer) from a backbone folder."""
    directory = Path(directory)
    config = json.loads((directory / CONFIG_FILE).read_text())
    model = build(config)
    # Stored in half precision to keep the repository small; computed in single.
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(directory / WEIGHTS_FILE).items()})
    tokenizer = open_clip.SimpleTokenizer(
        bpe_path=str(directory / MERGES_FILE), context_length=config["text_cfg"]["context_length"]
    )
    return model.eval(), preprocessing(config["vision_cfg"]["image_size"]), tokenizer
