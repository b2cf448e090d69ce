"""Many questions are answered at once, of any mixture of requests, tasks, candidates and snapshots, each for itself.

An answer is the same whatever shares its pass and whatever is kept already (to float32 rounding), because class
features are always interpolated between the same two points (answering/class_features.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

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
        for n, decision in zip(rows, decide(predictor, pixels, candidates, zero_shot=True), strict=True):
            answers[n] = _response(decision)
    return answers


def _response(decision: Decision) -> ImageAnswer:
    assert decision.zero_shot is not None  # it was asked for
    return ImageAnswer(
        **vars(decision.answer),
        top=_best(decision.names, decision.logits),
        plain_clip=_best(decision.names, decision.zero_shot),
    )


def _best(names: Sequence[str], logits: Tensor) -> list[Choice]:
    """Returns the best classes by their logits [C], the best of them first; of equals the one that was named first."""
    confidence, index = logits.softmax(0).sort(descending=True, stable=True)
    best = zip(index[:NUM_TOP].tolist(), confidence[:NUM_TOP].tolist(), strict=True)
    return [Choice(class_name=names[i], confidence=c) for i, c in best]
