"""KeepLoRA: low-rank changes in directions that neither the pre-trained weights nor earlier tasks rely on (Luo et al.,
ICLR 2026; read with the authors' code, MaolinLuo/KeepLoRA).

Beside the query, key, value and output projections x W of both towers, W [D, D'], a task adds x A B. Before its first
step, with G = Σ xᵀ δ the gradient of W over its training images:

    G' = (I − M Mᵀ) G = U S Vᵀ,    A = the first r columns of U, never trained,    B = 0, trained

M is an orthonormal basis of what is protected: the leading left singular vectors of the frozen W, up to a share of its
energy Σ s², and, of the earlier tasks, the leading directions of the inputs x of this projection, up to a share of
theirs. After a task A B stays in the weights. Here the pairs of all tasks stand side by side, which is that sum.

The authors' code for ViT-B/16: r 16, A B times 1/16; AdamW at lr 1e-3 with weight decay 0.01, batches of 64, one-cycle,
5 to 10 epochs; 0.99 of the inputs' energy; 0.85 (images) and 0.2 (texts) of the weights', with a classifier or without.
A gives no gradient outside its r directions; where all is protected it is 0 and the projection stays as it is.

Here otherwise: class texts answer, without a classifier; A B is taken times `alpha` / r, 1 by default; directions of
inputs are those of Σ xᵀ x over all tokens (there of batches averaged token by token), under the task's own weights, of
the last block's output projection over the tokens that are read. Directions of weights and of inputs are found apart
and then united; there those of the inputs extend those of the weights, which count towards the 0.99. Of the weights the
fewest directions that reach the share are protected, there those that together stay below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Block, Parameters, Residual
from diki_ray.errors import ConfigError
from diki_ray.learning.methods.base import Step, TrainingBatch
from diki_ray.learning.methods.low_rank import LowRank, LowRankMethod, keep, kept, trained

PROBE = "_probe"
"""Ends the name of a tensor of zeros [D, D'] that stands for a change of the whole projection: its gradient is G."""
READERS = {"q": "k", "k": "k", "v": "k", "out": "out"}
"""For each projection the inputs of this one are recorded: the keys' inputs are all tokens, also in the last block."""
NOTHING_LEFT = 1e-9
"""Singular values of G' below this share of G's norm are rounding."""

SAME = 1e-6
"""Two directions are one, up to the rounding of float32, where the sine of the angle between them is below it."""


@dataclass(frozen=True)
class ProbedLowRank(LowRank):
    parts: ClassVar[tuple[str, ...]] = ("q", "k", "v", "out")

    record: dict[str, list[Tensor]] | None = field(default=None, compare=False)
    """Where Σ xᵀ x [D, D] of each block goes, when it is asked for."""

    def part(self, name: str, x: Tensor, y: Tensor, tensors: dict[str, Tensor], weight: float | Tensor) -> Tensor:
        if self.record is not None and name in self.record:
            rows = x.detach().flatten(0, -2).double()
            self.record[name].append(rows.T @ rows)
        y = super().part(name, x, y, tensors, weight)
        probe = tensors.get(name + PROBE)
        return y if probe is None else y + x @ probe.to(x.dtype)


class KeepLora(LowRankMethod):
    """Kept beside a task's own factors: `old`, those of the tasks before; `seen`, the directions of their inputs."""

    name = "keep_lora"
    version = 1
    summary = (
        "KeepLoRA (Luo et al., ICLR 2026): low-rank changes in directions that neither the pre-trained weights nor "
        "earlier tasks rely on; the latest weights answer every image"
    )
    looks_first = True
    form = ProbedLowRank

    def __init__(
        self, backbone: Backbone, image_energy: float, text_energy: float, input_energy: float, **low_rank: Any
    ):
        super().__init__(backbone, **low_rank)
        self.energy = {"image": image_energy, "text": text_energy}
        self.input_energy = input_energy
        narrowest = min(tower.width for tower in backbone.towers)
        if self.low_rank.rank > narrowest:
            raise ConfigError(
                f"method.rank: a projection of {narrowest} inputs has no {self.low_rank.rank} directions; choose at "
                f"most {narrowest}."
            )

    def initial(self, generator: torch.Generator, predecessor: Parameters | None = None) -> Parameters:
        own = super().initial(generator)
        if predecessor is None:
            return own
        return own | keep("old", self.effective(predecessor)) | keep("seen", kept("seen", predecessor))

    @staticmethod
    def is_trained(name: str) -> bool:
        return LowRankMethod.is_trained(name) and not name.endswith("_down")

    def effective(self, parameters: Parameters, step: Step | None = None) -> Parameters:
        """The pairs of all tasks side by side."""
        old = kept("old", parameters)
        return {
            name: torch.cat([old[name], p], dim=0 if name.endswith("_down") else 1) if old else p
            for name, p in trained(parameters).items()
        }

    def first_sums(self, parameters: Parameters, batch: TrainingBatch) -> Parameters:
        """G of every projection, by its probe's name."""
        probes = {
            name.removesuffix("_down") + PROBE: torch.zeros(p.shape[1], p.shape[1], device=p.device).requires_grad_()
            for name, p in trained(parameters).items()
            if name.endswith("_down")
        }
        with torch.enable_grad():
            own = self.effective(parameters) | probes
            texts = self.text_features(batch.class_tokens, own)
            logits = self.backbone.logits(self.image_features(batch.images, own), texts)
            loss = F.cross_entropy(logits, batch.labels.to(logits.device), reduction="sum")
            gradients = torch.autograd.grad(loss, list(probes.values()))
        return dict(zip(probes, gradients, strict=True))

    def begin(self, parameters: Parameters, sums: Parameters, class_tokens: Tensor) -> Parameters:
        seen, found = kept("seen", parameters), dict(parameters)
        for name, gradient in sums.items():
            tower, layer, part = name.removesuffix(PROBE).split(".")
            weights = self._frozen(tower, int(layer.removeprefix("layer")), part).double()
            bases = [leading(weights @ weights.T, self.energy[tower])]
            if (inputs := seen.get(f"{tower}.{layer}.{READERS[part]}")) is not None:
                bases.append(inputs.double().cpu())
            found[f"{tower}.{layer}.{part}_down"] = free_directions(gradient, span(bases), self.low_rank.rank)
        return found

    def sums(self, parameters: Parameters, batch: TrainingBatch) -> Parameters:
        """Σ xᵀ x of the inputs of every block's projections."""
        own, found = self.effective(parameters), Parameters()
        for tower, encode, given in (
            (self.backbone.image, self.backbone.encode_image, batch.images),
            (self.backbone.text, self.backbone.encode_text, batch.class_tokens),
        ):
            record: dict[str, list[Tensor]] = {"k": [], "out": []}
            branch = ProbedLowRank(self.low_rank.rank, self.low_rank.alpha, record)
            encode(given, Residual(branch, self._residual(tower, own, 1.0).layers, 1.0))
            depth = self.depth[tower.name]
            for part, grams in record.items():  # a tower may be passed through several times, block by block
                for layer in range(depth):
                    found[f"{tower.name}.layer{layer}.{part}"] = torch.stack(grams[layer::depth]).sum(0)
        return found

    def finish(self, parameters: Parameters, sums: Parameters) -> Parameters:
        seen = kept("seen", parameters)
        grown = {name: with_leading(seen.get(name), gram, self.input_energy) for name, gram in sums.items()}
        return parameters | keep("seen", grown)

    def _frozen(self, tower: str, layer: int, part: str) -> Tensor:
        """W [D, D']."""
        block: Block = {t.name: t for t in self.backbone.towers}[tower].block(layer)
        return block.output() if part == "out" else dict(zip("qkv", block.projections(), strict=True))[part]


def leading(gram: Tensor, share: float) -> Tensor:
    """The fewest eigenvectors [D, k] of a sum of outer products [D, D] that hold the share of its trace."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    held = values.cumsum(0) - values  # by those before each
    return vectors[:, held < share * values.sum()]


def with_leading(basis: Tensor | None, gram: Tensor, share: float) -> Tensor:
    """An orthonormal basis [D, k] with the fewest further directions until it holds the share of `gram`'s trace;
    float32."""
    if basis is None:
        return leading(gram, share).float()
    known = basis.double().cpu()
    off = torch.eye(len(gram), dtype=gram.dtype) - known @ known.T
    rest = off @ gram @ off
    missing = 1 - (1 - share) * gram.trace() / rest.trace().clamp(min=1e-300)
    return torch.cat([known, leading(rest, float(missing))], dim=1).float() if missing > 0 else basis


def span(bases: Sequence[Tensor]) -> Tensor:
    """An orthonormal basis [D, k] of what some orthonormal bases span together."""
    vectors, values, _ = torch.linalg.svd(torch.cat(list(bases), dim=1), full_matrices=False)
    return vectors[:, values > SAME]


def free_directions(gradient: Tensor, protected: Tensor, rank: int) -> Tensor:
    """[rank, D]: the leading left singular vectors of the gradient [D, D'] outside of the protected directions [D, k];
    0 where none is left."""
    free = gradient - protected @ (protected.T @ gradient)
    vectors, values, _ = torch.linalg.svd(free, full_matrices=False)
    some = values[:rank] > NOTHING_LEFT * gradient.norm()
    return (vectors[:, :rank] * some).T.float()
