"""This is where the features of candidate classes come from: computed at each image's own weight, or interpolated
between the points of a grid of weights. A predictor is given one of the two.

Class features change with the integration weight, so the exact ones cost a text pass over all candidates for every
distinct weight. A table costs two text passes when an image first needs a cell of it, and none after.

Shapes: B images, C candidate classes, K templates a class, L tokens, E embedding dimensions, G grid points.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from diki_ray.clip.backbone import Backbone

Key = tuple[str, str, float]
"""It is made of the digest of a module (empty: the frozen model), the key of candidates, and a weight."""
TEXT_BATCH = 1024
"""So many texts are encoded at once."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """The classes that an image may be answered with have names, and tokens [C, K, L]: the mean of the normalised
    features of a class's K captions, normalised again, is the class's feature."""

    names: tuple[str, ...]
    tokens: Tensor
    key: str
    """It identifies these candidates where class features are kept."""
    passing: bool = False
    """It says that only one request names them: their features are kept apart and so drive out no others."""
    parts: tuple[Candidates, ...] = ()
    """They are joined from these, whose tokens are not repeated. Joined with one more, none of their features is
    computed anew."""

    @staticmethod
    def of(
        backbone: Backbone, class_names: Sequence[str], templates: Sequence[str], passing: bool = False
    ) -> Candidates:
        tokens = torch.stack([backbone.tokenize(class_names, template) for template in templates], dim=1)
        return Candidates(tuple(class_names), tokens, repr((tuple(class_names), tuple(templates))), passing)

    @staticmethod
    @lru_cache(maxsize=4)
    def joined(parts: tuple[Candidates, ...]) -> Candidates:
        """Returns all of the parts as one: an image is then answered among hundreds of tasks' classes at once."""
        if len(parts) == 1:
            return parts[0]
        names = tuple(name for part in parts for name in part.names)
        return Candidates(
            names, torch.empty(0), repr([part.key for part in parts]), any(p.passing for p in parts), parts
        )


@dataclass(frozen=True, eq=False)
class PromptedClasses:
    """These are candidates under the text prompts of one task's module, or under none (the frozen model)."""

    backbone: Backbone
    candidates: Candidates
    encode: Callable[[Tensor, float], Tensor]
    """It gives normalised features [N, E] of tokens [N, L] at a weight."""
    digest: str
    """It is the module's sha256, or empty for the frozen model."""

    @property
    def parts(self) -> list[PromptedClasses]:
        return [replace(self, candidates=part) for part in self.candidates.parts]

    @property
    def key(self) -> tuple[str, str]:
        return self.digest, self.candidates.key

    @torch.no_grad()
    def features(self, weight: float) -> Tensor:
        """Returns [C, E] at a weight, on the CPU."""
        if self.candidates.parts:
            return torch.cat([part.features(weight) for part in self.parts])
        c, k, _ = self.candidates.tokens.shape
        chunks = self.candidates.tokens.flatten(0, 1).split(TEXT_BATCH)
        features = torch.cat([self.encode(chunk, weight) for chunk in chunks]).unflatten(0, (c, k))
        return (features[:, 0] if k == 1 else F.normalize(features.mean(1), dim=-1)).cpu()


class FeatureCache:
    """Keeps class features [C, E] by key and drops the longest unused beyond a number of bytes. It is for one
    thread."""

    def __init__(self, max_bytes: float) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Key, Tensor] = OrderedDict()

    def known(self) -> list[Key]:
        return list(self._kept)

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def get(self, key: Key, compute: Callable[[], Tensor]) -> Tensor:
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = compute()
            self.num_bytes += found.nbytes
        self._kept.move_to_end(key)
        while self.num_bytes > self._max_bytes and len(self._kept) > 1:
            self.num_bytes -= self._kept.popitem(last=False)[1].nbytes
        return found

    def take(self, key: Key) -> Tensor | None:
        """Returns what is kept under a key, and keeps it no longer."""
        found = self._kept.pop(key, None)
        self.num_bytes -= 0 if found is None else found.nbytes
        return found


class ClassFeatures(ABC):
    """Gives logits of image features among candidate classes.

    One object may serve several predictors over the same backbone: what it keeps is known by the modules' digests.

    max_bytes: class features that are kept; max_passing_bytes: the same of `passing` candidates, apart from the others
        (by default together with them). The longest unused are computed again beyond that.
    """

    def __init__(self, max_bytes: float = math.inf, max_passing_bytes: float | None = None) -> None:
        self.kept = FeatureCache(max_bytes)
        self.passing = self.kept if max_passing_bytes is None else FeatureCache(max_passing_bytes)
        self._joined: dict[tuple[str, float], tuple[str, list[tuple[str, int]]]] = {}
        """By module and weight the key of the candidates that were joined last, and their parts' keys and sizes."""

    @abstractmethod
    def logits(self, features: Tensor, weight: Tensor, classes: PromptedClasses) -> Tensor:
        """Returns [B, C] on the CPU for image features [B, E], each among the classes at its own weight, float32
        [B]."""

    def error(self, classes: PromptedClasses) -> float:
        """Returns the largest absolute error of one of these class features (norm 1) over all weights."""
        return 0.0

    def interpolated(self, classes: PromptedClasses) -> bool:
        """Says whether features between two points of a grid were used of these classes, as far as they are kept."""
        return False

    def _at(self, weight: float, classes: PromptedClasses) -> Tensor:
        cache = self.passing if classes.candidates.passing else self.kept
        return cache.get((*classes.key, weight), lambda: self._computed(weight, classes))

    def _computed(self, weight: float, classes: PromptedClasses) -> Tensor:
        """The features of joined candidates take those of the candidates that were joined before them, which are then
        no longer kept: each class is kept once, and only a new task's are computed."""
        if not classes.candidates.parts:
            return classes.features(weight)
        known: dict[str, Tensor] = {}
        if (classes.digest, weight) in self._joined:
            key, parts = self._joined[classes.digest, weight]
            if (found := self.kept.take((classes.digest, key, weight))) is not None:
                features = found.split([size for _, size in parts])
                known = {name: f for (name, _), f in zip(parts, features, strict=True)}
        parts = [(part.key, len(part.names)) for part in classes.candidates.parts]
        self._joined[classes.digest, weight] = classes.candidates.key, parts
        if len(self._joined) > 2 * len(self.kept.known()) + 64:  # of modules that are gone, or that nobody asks for
            kept = set(self.kept.known())
            self._joined = {(d, w): (k, p) for (d, w), (k, p) in self._joined.items() if (d, k, w) in kept}
        joined = []
        for part in classes.parts:
            alone = known.get(part.candidates.key)
            if alone is None:  # it may have been the only task
                alone = self.kept.take((*part.key, weight))
            joined.append(part.features(weight) if alone is None else alone)
        return torch.cat(joined)


class Exact(ClassFeatures):
    """Computes class features at each image's own weight, with one text pass for each distinct weight.

    It keeps those of weight 0, the frozen model's, and of weight 1, for which batch after batch asks.
    """

    def __init__(self, max_bytes: float = 256 * 2**20) -> None:
        super().__init__(max_bytes)

    def logits(self, features: Tensor, weight: Tensor, classes: PromptedClasses) -> Tensor:
        out = torch.empty(len(features), len(classes.candidates.names))
        for w in weight.unique().tolist():
            text = self._at(w, classes) if w in (0.0, 1.0) else classes.features(w)
            rows = weight == w
            out[rows] = classes.backbone.logits(features[rows], text)
        return out


class Tabulated(ClassFeatures):
    """Computes class features at G weights in [0, 1], each when an image first needs it, and interpolates linearly
    between them. They are exact at the grid points, among them the frozen model's and those at weight 1.

    An image is always interpolated between the same two points, so its answer does not depend on what shares its batch
    or was asked before.
    """

    def __init__(self, num_points: int, max_bytes: float = math.inf, max_passing_bytes: float | None = None) -> None:
        super().__init__(max_bytes, max_passing_bytes)
        self.num_points = num_points

    def logits(self, features: Tensor, weight: Tensor, classes: PromptedClasses) -> Tensor:
        """Returns exp(logit_scale) · f · normalise((1−a) T_g + a T_{g+1}) for each image, without class features
        [C, E] of its own: both ends are unit vectors, so the norm is √((1−a)² + a² + 2a(1−a) T_g·T_{g+1})."""
        logits = classes.backbone.logits
        position = weight * (self.num_points - 1)
        cell = position.long().clamp(max=self.num_points - 2)
        a = (position - cell).unsqueeze(1)
        out = torch.empty(len(features), len(classes.candidates.names))
        for g in cell.unique().tolist():
            rows = cell == g
            f, ar = features[rows], a[rows]
            if bool((ar == ar[0]).all()) and float(ar[0]) in (0.0, 1.0):  # only at a grid point
                out[rows] = logits(f, self._point(g + int(ar[0]), classes))
                continue
            low, high = self._point(g, classes), self._point(g + 1, classes)
            norm = ((1 - ar) ** 2 + ar**2 + 2 * ar * (1 - ar) * (low * high).sum(1)).sqrt()
            out[rows] = ((1 - ar) * logits(f, low) + ar * logits(f, high)) / norm
        return out

    def error(self, classes: PromptedClasses) -> float:
        """It is measured in the middle of every cell, where the error of a linear interpolation is greatest."""
        table = torch.stack([self._point(g, classes) for g in range(self.num_points)])
        middle = F.normalize((table[1:] + table[:-1]) / 2, dim=-1)
        exact = torch.stack([classes.features((g + 0.5) / (len(table) - 1)) for g in range(len(middle))])
        return float((middle - exact).abs().max())

    def interpolated(self, classes: PromptedClasses) -> bool:
        cache = self.passing if classes.candidates.passing else self.kept
        return sum((*classes.key, self._weight(g)) in cache for g in range(self.num_points)) > 1

    def _point(self, point: int, classes: PromptedClasses) -> Tensor:
        return self._at(self._weight(point), classes)

    def _weight(self, point: int) -> float:
        return point / (self.num_points - 1)
