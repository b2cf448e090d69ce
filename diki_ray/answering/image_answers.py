"""Images become answers that people read: batch inference, single predictions and the server all answer here.

Each image is answered for itself (`image` routing) among candidates of its own. One frozen and one residual pass serve
them all, whatever mixture of tasks and candidates they are.

Shapes: B images, C candidate classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from diki_ray.answering.class_features import Candidates
from diki_ray.answering.predictor import Predictor
from diki_ray.answering.routing import NO_TASK


@dataclass(frozen=True)
class Answer:
    """This is what one image was answered with, and how it came about."""

    class_name: str
    confidence: float
    """It is the softmax probability among the candidate classes."""
    task: str | None
    """Its module answered; None: the frozen model did alone, or all modules together (a method that answers
    jointly)."""
    weight: float
    """It is the image's integration weight, 0 to 1."""
    log_densities: Mapping[str, float]
    """They are the image's under every task but those that a bound ruled out; the highest is the route."""


@dataclass(frozen=True, eq=False)
class Decision:
    """This is one image's answer with what it was chosen from."""

    answer: Answer
    names: Sequence[str]
    """They are the C candidate classes."""
    logits: Tensor  # [C]
    zero_shot: Tensor | None  # [C], the frozen model's, where they were asked for


def decide(
    predictor: Predictor, images: Tensor, candidates: Sequence[Sequence[Candidates]], zero_shot: bool = False
) -> list[Decision]:
    """Answers each of the preprocessed images [B, 3, H, W], in their order.

    candidates: for each image the classes that it may be answered with.
    zero_shot: gives as well what the frozen model alone says of them.
    """
    frozen = predictor.frozen_features(images)
    scores = predictor.scores(frozen)
    routes = predictor.routes(scores, "image")
    features = predictor.image_features(images, frozen, routes)
    tasks, answering = [module.task for module in predictor.modules], predictor.answering_task(routes).tolist()
    decisions: dict[int, Decision] = {}
    groups: dict[tuple[str, ...], list[int]] = {}
    for n, blocks in enumerate(candidates):
        groups.setdefault(tuple(block.key for block in blocks), []).append(n)
    for group in groups.values():
        rows, among = torch.tensor(group), Candidates.joined(tuple(candidates[group[0]]))
        logits = predictor.answer_logits(features[rows], frozen[rows], routes.of(rows), [among])
        plain = predictor.zero_shot_logits(frozen[rows], [among]) if zero_shot else [None] * len(group)
        confidence, best = logits.softmax(1).max(1)
        for i, n in enumerate(group):
            answer = Answer(
                class_name=among.names[int(best[i])],
                confidence=float(confidence[i]),
                task=None if answering[n] == NO_TASK else tasks[answering[n]],
                weight=float(routes.weight[n]),
                log_densities={t: d for t, d in zip(tasks, scores.log_density[n].tolist(), strict=True) if d > -inf},
            )
            decisions[n] = Decision(answer, among.names, logits[i], plain[i])
    return [decisions[n] for n in range(len(images))]
