"""Many questions at once, of any mixture of requests, tasks, candidates and snapshots, each answered for itself.

Class features are interpolated between the points of a grid of weights (answering/class_features.py). An answer is
the same whatever shares its pass and whatever is kept already (to float32 rounding), because it is always interpolated
between the same two points.

Shapes: B images, C candidate classes, E embedding dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from diki_ray.answering.class_features import ClassTable, FeatureCache
from diki_ray.answering.predictor import Candidates
from diki_ray.answering.routing import NO_TASK, Routes
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
                points = self._table(snapshot, t, block)
                if t == NO_TASK or weight is None:
                    parts.append(predictor.backbone.logits(features[rows], points[0]))
                else:
                    parts.append(predictor.interpolated(features[rows], weight[rows].float(), points))
            out[rows] = torch.cat(parts, dim=1)
        return out

    def _table(self, snapshot: Snapshot, task: int, candidates: Candidates) -> ClassTable:
        is_learnt = any(block.key == candidates.key for block in snapshot.learnt)
        digest = "" if task == NO_TASK else snapshot.digests[task]
        return ClassTable(
            self._num_points,
            self.learnt if is_learnt else self.named,
            (digest, candidates.key),
            lambda weight: snapshot.predictor.class_features(task, weight, candidates),
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
