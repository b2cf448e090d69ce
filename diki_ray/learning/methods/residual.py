"""What all methods share that add a branch in the blocks of the frozen towers."""

from __future__ import annotations

import torch
from torch import Tensor

from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Parameters, Residual, ResidualBranch, Tower
from diki_ray.errors import ConfigError
from diki_ray.learning.methods.base import Method


class ResidualMethod(Method):
    """Methods whose task is one residual branch in the first `depth` blocks of each tower."""

    def __init__(
        self,
        backbone: Backbone,
        image: tuple[int, ResidualBranch],
        text: tuple[int, ResidualBranch],
    ):
        """image, text: (depth, branch) of each tower; depth 0 leaves a tower frozen."""
        super().__init__(backbone)
        self.depth = {"image": image[0], "text": text[0]}
        self.branch = {"image": image[1], "text": text[1]}
        for tower in backbone.towers:
            if self.depth[tower.name] > tower.num_blocks:
                raise ConfigError(
                    f"method.{tower.name}_depth: {self.depth[tower.name]} blocks were asked for, the {tower.name} "
                    f"tower of {backbone.name!r} has {tower.num_blocks}."
                )
            missing = [part for part in self.branch[tower.name].parts if not tower.has(part)]
            if missing and self.depth[tower.name]:
                raise ConfigError(
                    f"method.name: {self.name} changes {', '.join(missing)} of each block, and the {tower.name} tower "
                    f"of {backbone.name!r} has no such part that is known here."
                )

    def initial(self, generator: torch.Generator, predecessor: Parameters | None = None) -> Parameters:
        return {
            f"{tower.name}.layer{layer}.{name}": tensor
            for tower in self.backbone.towers
            for layer in range(self.depth[tower.name])
            for name, tensor in self.branch[tower.name].initial(tower.block(layer), generator).items()
        }

    def image_features(self, images: Tensor, parameters: Parameters, weight: float | Tensor = 1.0) -> Tensor:
        return self.backbone.encode_image(images, self._residual(self.backbone.image, parameters, weight))

    def text_features(self, tokens: Tensor, parameters: Parameters, weight: float | Tensor = 1.0) -> Tensor:
        return self.backbone.encode_text(tokens, self._residual(self.backbone.text, parameters, weight))

    def _residual(self, tower: Tower, parameters: Parameters, weight: float | Tensor) -> Residual:
        layers: list[dict[str, Tensor]] = [{} for _ in range(self.depth[tower.name])]
        for key, tensor in parameters.items():
            owner, layer, name = key.split(".")
            if owner == tower.name:
                layers[int(layer.removeprefix("layer"))][name] = tensor
        return Residual(self.branch[tower.name], layers, weight)
