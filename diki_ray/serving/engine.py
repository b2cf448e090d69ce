"""Many questions are answered at once, of any mixture of requests, tasks, candidates and snapshots, each for itself.

An answer is the same whatever shares its pass and whatever is kept already (to float32 rounding), because class
features are always interpolated between the same two points (answering/class_features.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diki_ray.answering.class_features import Candidates
from diki_ray.answering.image_answers import Decision, decide
from diki_ray.serving.schema import Choice, ImageAnswer
from diki_ray.serving.snapshot import Snapshot

NUM_TOP = 5


@dataclass(frozen=True, eq=False)
class Question:
    """Asks for one image, preprocessed to [3, H, W], under one snapshot, among some candidates."""

    pixels: Tensor
    snapshot: Snapshot
    candidates: tuple[Candidates, ...]
    deadline: float
    """From then on, by time.monotonic(), nobody waits for the answer any more."""


def answer_questions(questions: Sequence[Question]) -> list[ImageAnswer | None]:
    """Returns the answers in the order of the questions; None for those whose deadline is over.

    It is called by one thread at a time, as the backbone holds the residual in use.
    """
    now = time.monotonic()
    answers: list[ImageAnswer | None] = [None] * len(questions)
    groups: dict[int, list[int]] = {}
    for n, question in enumerate(questions):
        if question.deadline > now:
            groups.setdefault(id(question.snapshot), []).append(n)
    for rows in groups.values():
        pixels = torch.stack([questions[n].pixels for n in rows])
        candidates = [questions[n].candidates for n in rows]
        predictor = questions[rows[0]].snapshot.predictor
        for n, answer in zip(rows, _answered(decide(predictor, pixels, candidates, zero_shot=True)), strict=True):
            answers[n] = answer
    return answers


def _answered(decisions: Sequence[Decision]) -> list[ImageAnswer]:
    """Returns decisions as they are sent; the best classes of those that chose among the same names at once."""
    answers: list[Any] = [None] * len(decisions)
    groups: dict[int, list[int]] = {}
    for n, decision in enumerate(decisions):
        groups.setdefault(id(decision.names), []).append(n)
    for group in groups.values():
        of = [decisions[n] for n in group]
        top = _best(of[0].names, [d.logits for d in of])
        plain = _best(of[0].names, [d.zero_shot for d in of if d.zero_shot is not None])  # they were asked for
        for n, d, best, plain_best in zip(group, of, top, plain, strict=True):
            answers[n] = ImageAnswer(**vars(d.answer), top=best, plain_clip=plain_best)
    return answers


def _best(names: Sequence[str], logits: Sequence[Tensor]) -> list[list[Choice]]:
    """Returns for each image the best classes by its logits [C], the best of them first; of equals the one that was
    named first."""
    confidence, index = torch.stack(tuple(logits)).softmax(1).sort(dim=1, descending=True, stable=True)
    best = zip(index[:, :NUM_TOP].tolist(), confidence[:, :NUM_TOP].tolist(), strict=True)
    return [[Choice(class_name=names[i], confidence=c) for i, c in zip(*row, strict=True)] for row in best]
