"""DIKI: residual prompt attention in both towers (Tang et al., ECCV 2024, arXiv 2407.05342).

Published for ViT-B/16 (OpenAI weights): depth 8 of 12 blocks and length 8 in both towers, 163,840 parameters a task;
SGD at lr 5.0, batch 128, 10 epochs.
"""

from __future__ import annotations

from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import PromptAttention
from diki_ray.learning.methods.residual import ResidualMethod


class Diki(ResidualMethod):
    """Initial keys uniform in (−1, 1), values zero: an untrained task adds exactly nothing."""

    name = "diki"
    version = 1
    summary = (
        "DIKI (Tang et al., ECCV 2024, arXiv 2407.05342): residual prompt attention, switched on for an image as far "
        "as it looks like something learnt; for everything else the model is the pre-trained one"
    )

    def __init__(self, backbone: Backbone, image_depth: int, image_length: int, text_depth: int, text_length: int):
        super().__init__(
            backbone, (image_depth, PromptAttention(image_length)), (text_depth, PromptAttention(text_length))
        )
