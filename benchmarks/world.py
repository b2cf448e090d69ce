"""What is measured on, and the straightforward port of the method that it is measured against.

Weights and images are random: speed does not depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from diki_ray.answering.predictor import Predictor
from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods import Diki
from diki_ray.learning.module import TaskModule
from diki_ray.learning.moments import Moments
from diki_ray.learning.statistics import Statistics

MODELS: dict[str, dict[str, Any]] = {
    "debug": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
    # The embedded CLIP's towers, with the usual context of 77 tokens, which the embedded one does not have.
    "tiny": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 48, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
    },
    "ViT-B-16": {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
        "quick_gelu": True,
    },
}
WORDS = ("red", "old", "small", "wooden", "glass", "wild", "north", "round", "green", "tall")
TEMPLATE = "a photo of a {}."


@dataclass(frozen=True, eq=False)
class World:
    """A frozen CLIP with random weights, the published DIKI on it, and what to feed them."""

    backbone: Backbone
    method: Diki
    model: str
    image_size: int
    device: str

    @staticmethod
    def make(model: str, device: str) -> World:
        torch.manual_seed(0)
        config = MODELS[model]
        size = config["vision_cfg"]["image_size"]
        clip = open_clip.model.CLIP(**config)
        preprocess = open_clip.image_transform(size, is_train=False)
        backbone = Backbone(clip, preprocess, open_clip.SimpleTokenizer(context_length=77), model)
        backbone.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
        depth = min(8, backbone.image.num_blocks)
        text_depth = min(8, backbone.text.num_blocks)
        return World(backbone, Diki(backbone, depth, 8, text_depth, 8), model, size, device)

    def images(self, n: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n, 3, self.image_size, self.image_size, generator=generator).to(self.device)

    def names(self, n: int) -> list[str]:
        return [f"{WORDS[i % 10]} {WORDS[i // 10 % 10]} thing {i}" for i in range(n)]

    def tokens(self, num_classes: int) -> Tensor:
        return self.backbone.tokenize(self.names(num_classes), TEMPLATE).to(self.device)

    def parameters(self, seed: int, scale: float = 0.1) -> Parameters:
        generator = torch.Generator().manual_seed(seed)
        initial = self.method.initial(generator)
        return {
            n: p if n.endswith("keys") else scale * torch.randn(p.shape, generator=generator)
            for n, p in initial.items()
        }

    def module(self, task: int, class_names: list[str], images: Tensor, labels: Tensor | None = None) -> TaskModule:
        """A learnt task with random prompts and the statistics of these images, by class where there are labels."""
        with torch.no_grad():
            features = self.backbone.encode_image(images).cpu()
        parameters = {n: p.numpy() for n, p in self.parameters(task).items()}
        name = str(task)
        names, templates = tuple(class_names), (TEMPLATE,)
        sums = None if labels is None else Statistics.of(features, labels, len(names))
        moments, few = Moments.of(features) if sums is None else sums.moments, features[:64].numpy()
        return TaskModule(name, name, names, templates, "diki", parameters, moments, few, statistics=sums)


@contextmanager
def all_tokens_in_the_last_block(backbone: Backbone) -> Iterator[None]:
    """Not only the one that is read."""
    could = [tower.can_read_alone for tower in backbone.towers]
    for tower in backbone.towers:
        tower.can_read_alone = False
    try:
        yield
    finally:
        for tower, can in zip(backbone.towers, could, strict=True):
            tower.can_read_alone = can


@contextmanager
def one_text_a_row(backbone: Backbone) -> Iterator[None]:
    """The beginning that class names share is computed for each of them."""
    usual, backbone.texts_a_row = backbone.texts_a_row, 1
    try:
        yield
    finally:
        backbone.texts_a_row = usual


@contextmanager
def untrimmed(backbone: Backbone) -> Iterator[None]:
    """All 77 tokens go through the text tower."""
    backbone._needed_length = lambda tokens: tokens.shape[1]  # type: ignore[method-assign]
    try:
        yield
    finally:
        del backbone._needed_length


class Port:
    """The published code's way through the same mathematics, on the same model: a frozen pass at each step, 77 tokens,
    all of the last block, the text tower for every batch, one process, every cell of the accuracy matrix afresh."""

    def __init__(self, world: World):
        self.backbone, self.method = world.backbone, world.method

    def text(self, tokens: Tensor, parameters: Parameters, weight: float = 1.0) -> Tensor:
        """All 77 tokens, through open_clip's own encode_text."""
        tower = self.backbone.text
        tower.active = self.method._residual(tower, parameters, weight)
        features = self.backbone.model.encode_text(tokens.to(self.backbone.device))
        return F.normalize(features.float(), dim=-1)

    def image(self, images: Tensor, parameters: Parameters | None = None, weight: float | Tensor = 1.0) -> Tensor:
        """Likewise through encode_image; without parameters the frozen tower."""
        tower = self.backbone.image
        tower.active = None if parameters is None else self.method._residual(tower, parameters, weight)
        return F.normalize(self.backbone.model.encode_image(images.to(self.backbone.dtype)).float(), dim=-1)

    def train_step(
        self, images: Tensor, labels: Tensor, tokens: Tensor, parameters: Parameters, optimizer: torch.optim.Optimizer
    ) -> float:
        with torch.no_grad():
            self.image(images)
        features = self.image(images, parameters)
        loss = F.cross_entropy(self.backbone.logits(features, self.text(tokens, parameters)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate_batch(self, images: Tensor, predictor: Predictor, tokens: Tensor, learnt: int) -> Tensor:
        """Answers of one batch under the vote: frozen pass, densities, residual pass, text tower; nothing is kept."""
        routes = predictor.routes(predictor.scores(self.image(images).cpu(), range(learnt)), "batch")
        parameters = predictor.parameters[int(routes.task[0])]
        features = self.image(images, parameters, routes.weight.float().to(images.device))
        text = self.text(tokens, parameters, float(routes.text_weight[0]))
        return self.backbone.logits(features, text).argmax(1).cpu()
