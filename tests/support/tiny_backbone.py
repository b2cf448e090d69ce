"""A small CLIP with random weights, as a backbone file: for tests that care about everything but accuracy."""

from __future__ import annotations

from pathlib import Path

SOURCE = """\
import open_clip
import torch
from torchvision import transforms as T


def create(directory):
    torch.manual_seed(0)
    model = open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        text_cfg={"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    )
    preprocess = T.Compose([T.Resize(32), T.CenterCrop(32), T.ToTensor()])
    return model, preprocess, open_clip.SimpleTokenizer(context_length=24)
"""


def write_tiny_backbone(folder: Path) -> Path:
    """The file's path; its dimension is 32."""
    path = folder / "tiny_backbone.py"
    path.write_text(SOURCE)
    return path
