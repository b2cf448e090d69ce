"""Many questions at once, of any mixture of requests, tasks, candidates and snapshots, each answered for itself.

Class features are kept at the points of a grid of weights, each computed when an image first needs it, and interpolated
in between: a new task or vocabulary costs two text passes at first, not one for every image and not a whole table. An
answer is the same whatever shares its pass and whatever is kept already (to float32 rounding), because it is always
interpolated between the same two points.

Shapes: B images, C candidate classes, E embedding dimensions.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from diki_ray.model.predictor import Candidates
from diki_ray.model.routing import NO_TASK, Routes
from diki_ray.serving.schema import Choice, ImageAnswer
from diki_ray.serving.settings import Settings
from diki_ray.serving.snapshot import Snapshot

NUM_TOP = 5


@dataclass(frozen=True, eq=False)
class Question:
    """One image, preprocessed to [3, H, W], under one snapshot, among some candidates."""

    pixels: Tensor
    snapshot: Snapshot
    candidates: tuple[Candidates, ...]
    deadline: float
    """By time.monotonic(): nobody waits for the answer any more."""


class FeatureCache:
    """Class features [C, E] by key, the longest unused dropped beyond a number of bytes. For one thread."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, int, str], Tensor] = OrderedDict()

    def get(self, key: tuple[str, int, str], compute: Callable[[], Tensor]) -> Tensor:
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = compute().cpu()
            self.num_bytes += found.nbytes
        self._kept.move_to_end(key)
        while self.num_bytes > self._max_bytes and len(self._kept) > 1:
            self.num_bytes -= self._kept.popitem(last=False)[1].nbytes
        return found


class Engine:
    """Answers questions; for one thread at a time, as the backbone holds the residual in use."""

    def __init__(self, settings: Settings) -> None:
        self._num_points = settings.text_grid
        self.learnt = FeatureCache(settings.learnt_cache_bytes)
        self.named = FeatureCache(settings.named_cache_bytes)

    def answer(self, questions: Sequence[Question]) -> list[ImageAnswer | None]:
        """In their order; None for those whose deadline is over."""
        now = time.monotonic()
        answers: list[ImageAnswer | None] = [None] * len(questions)
        groups: dict[int, list[int]] = {}
        for n, question in enumerate(questions):
            if question.deadline > now:
                groups.setdefault(id(question.snapshot), []).append(n)
        for rows in groups.values():
            found = self._under(questions[rows[0]].snapshot, [questions[n] for n in rows])
            for n, answer in zip(rows, found, strict=True):
                answers[n] = answer
        return answers

    def _under(self, snapshot: Snapshot, questions: Sequence[Question]) -> list[ImageAnswer]:
        predictor = snapshot.predictor
        images = torch.stack([question.pixels for question in questions])
        frozen = predictor.frozen_features(images)
        densities = predictor.log_density(frozen)
        routes = predictor.route(densities, "image")
        features = predictor.image_features(images, frozen, routes)
        task = torch.where(routes.weight < predictor.skip_weight, NO_TASK, routes.task)
        answering = Routes(task, routes.weight, routes.text_weight)

        logits: list[Tensor] = [torch.empty(0)] * len(questions)
        plain: list[Tensor] = [torch.empty(0)] * len(questions)
        groups: dict[tuple[str, ...], list[int]] = {}
        for n, question in enumerate(questions):
            groups.setdefault(tuple(c.key for c in question.candidates), []).append(n)
        for group in groups.values():
            rows, candidates = torch.tensor(group), questions[group[0]].candidates
            ours = self._logits(snapshot, features[rows], task[rows], routes.weight[rows], candidates)
            alone = self._logits(snapshot, frozen[rows], torch.full((len(group),), NO_TASK), None, candidates)
            if predictor.method.answering == "joint":
                names = [name for block in candidates for name in block.names]
                ours = predictor.joint_logits(frozen[rows], alone, names, range(len(snapshot.tasks)))
            for i, n in enumerate(group):
                logits[n], plain[n] = ours[i], alone[i]
        return [
            _told(snapshot, questions[n].candidates, answering, densities, n, logits[n], plain[n])
            for n in range(len(questions))
        ]

    def _logits(
        self,
        snapshot: Snapshot,
        features: Tensor,
        task: Tensor,
        weight: Tensor | None,
        candidates: Sequence[Candidates],
    ) -> Tensor:
        """[B, C] among all candidates, each image under its task's text prompts at its weight."""
        predictor = snapshot.predictor
        out = torch.empty(len(features), sum(len(c.names) for c in candidates))
        for t in task.unique().tolist():
            rows = (task == t).nonzero().flatten()
            parts = []
            for block in candidates:
                points = _Points(self, snapshot, t, block, self._num_points)
                if t == NO_TASK or weight is None:
                    parts.append(predictor.backbone.logits(features[rows], points[0]))
                else:
                    parts.append(predictor.interpolated(features[rows], weight[rows].float(), points))
            out[rows] = torch.cat(parts, dim=1)
        return out


class _Points(Sequence[Tensor]):
    """Class features [C, E] of some candidates under a task at the grid's weights, from 0 to 1; kept, or computed."""

    def __init__(self, engine: Engine, snapshot: Snapshot, task: int, candidates: Candidates, num_points: int) -> None:
        self._snapshot, self._task, self._candidates = snapshot, task, candidates
        self._num_points = num_points
        is_learnt = any(block.key == candidates.key for block in snapshot.learnt)
        self._cache = engine.learnt if is_learnt else engine.named

    def __len__(self) -> int:
        return self._num_points

    def __getitem__(self, point: int) -> Tensor:  # type: ignore[override]
        snapshot, task = self._snapshot, self._task
        weight = point / (self._num_points - 1)
        return self._cache.get(
            ("" if task == NO_TASK else snapshot.digests[task], point, self._candidates.key),
            lambda: snapshot.predictor.class_features(task, weight, self._candidates),
        )


def _told(
    snapshot: Snapshot,
    candidates: Sequence[Candidates],
    answering: Routes,
    densities: Tensor,
    n: int,
    logits: Tensor,
    plain: Tensor,
) -> ImageAnswer:
    names = [name for block in candidates for name in block.names]
    task, top = int(answering.task[n]), _best(names, logits)
    return ImageAnswer(
        class_name=top[0].class_name,
        confidence=top[0].confidence,
        top=top,
        task=None if task == NO_TASK else snapshot.tasks[task],
        weight=float(answering.weight[n]),
        log_densities={t: d for t, d in zip(snapshot.tasks, densities[n].tolist(), strict=True) if isfinite(d)},
        plain_clip=_best(names, plain),
    )


def _best(names: Sequence[str], logits: Tensor) -> list[Choice]:
    confidence, index = logits.softmax(0).topk(min(NUM_TOP, len(names)))
    return [Choice(class_name=names[i], confidence=c) for c, i in zip(confidence.tolist(), index.tolist(), strict=True)]
