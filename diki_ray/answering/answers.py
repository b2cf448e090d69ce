"""From answers to accuracies: what is kept for each test image, so that the accuracy after learning any tasks in any
order is array indexing (architecture.md, ideas 1c and 12).

Under `image` routing an image's answer depends on nothing but the task it is routed to: its weight follows from that
task's density alone. So per image are kept its log density under every task, and for each route that matters the best
class of every *block* of candidates (the classes of one data set): the answer over any union of blocks, whatever was
learnt by then, is the block with the highest best logit.

Shapes: N images, T tasks, K blocks of candidates. Route T is the frozen model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diki_ray.answering.class_features import Candidates
from diki_ray.answering.predictor import Predictor
from diki_ray.answering.routing import NO_TASK, Answering, Routes

Names = Sequence[Sequence[str]]
"""For each task its class names."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What N images were answered with: the class `best` of the data set of task `block`, and how it came about."""

    block: np.ndarray  # int64 [N]
    best: np.ndarray  # int64 [N]
    confidence: np.ndarray  # float32 [N], softmax probability among the candidates
    routed: np.ndarray  # int64 [N], NO_TASK: the frozen model answered
    weight: np.ndarray  # float64 [N], the image's integration weight

    @staticmethod
    def concatenated(parts: Sequence[Prediction]) -> Prediction:
        return Prediction(**{name: np.concatenate([vars(p)[name] for p in parts]) for name in vars(parts[0])})

    def correct(self, labels: np.ndarray, task: int, names: Names) -> np.ndarray:
        """bool [N]: the right class, or one of the right class's name in another data set."""
        right = (self.block == task) & (self.best == labels)
        for n in np.flatnonzero(self.block != task):
            right[n] = names[self.block[n]][self.best[n]] == names[task][labels[n]]
        return right


@dataclass(eq=False)
class Answers:
    """The answers of N images of one test set (or of a part of it)."""

    labels: np.ndarray  # int64 [N]
    log_density: np.ndarray  # float64 [N, T]
    weight: np.ndarray  # float64 [N, T], the integration weight were the image routed there
    answered: np.ndarray  # bool [N, T + 1]
    best_logit: np.ndarray  # float32 [N, T + 1, K]
    best_class: np.ndarray  # int32 [N, T + 1, K], the class's number within its block
    log_sum: np.ndarray  # float32 [N, T + 1, K], logsumexp over the block's logits: confidences follow from it
    answering: Answering = "routed"
    """`joint`: no route of the table but the frozen model's is an answer; see `predict_along`."""

    @staticmethod
    def empty(labels: np.ndarray, num_tasks: int, num_blocks: int, answering: Answering = "routed") -> Answers:
        n = len(labels)
        shape = (n, num_tasks + 1, num_blocks)
        return Answers(
            labels=np.asarray(labels, np.int64),
            log_density=np.zeros((n, num_tasks)),
            weight=np.zeros((n, num_tasks)),
            answered=np.zeros((n, num_tasks + 1), bool),
            best_logit=np.full(shape, -np.inf, np.float32),
            best_class=np.full(shape, -1, np.int32),
            log_sum=np.full(shape, -np.inf, np.float32),
            answering=answering,
        )

    @staticmethod
    def concatenated(parts: Sequence[Answers]) -> Answers:
        arrays = (name for name in vars(parts[0]) if name != "answering")
        joined = {name: np.concatenate([vars(p)[name] for p in parts]) for name in arrays}
        return Answers(**joined, answering=parts[0].answering)

    def rows(self, rows: slice) -> Answers:
        return replace(self, **{n: array[rows].copy() for n, array in vars(self).items() if n != "answering"})

    def routes(self, learnt: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The task [N] whose module answers each image once `learnt` are learnt in that order, or NO_TASK, and the
        weight [N] at which it does."""
        rows = np.arange(len(self.labels))
        if not len(learnt) or self.answering in ("frozen", "joint"):
            return np.full(len(rows), NO_TASK), np.zeros(len(rows))
        order = np.asarray(learnt)
        routed = order[self.log_density[:, order].argmax(1) if self.answering == "routed" else np.full(len(rows), -1)]
        return routed, self.weight[rows, routed]

    def predict(self, learnt: Sequence[int], candidates: Sequence[int], columns: Sequence[int]) -> Prediction:
        """The predictions once `learnt` (in that order) are learnt, among the classes of the data sets of tasks
        `candidates`, which lie in `columns` of the blocks. Ties go to the task learnt first."""
        rows = np.arange(len(self.labels))
        routed, weight = self.routes(learnt)
        route = np.where(routed == NO_TASK, self.answered.shape[1] - 1, routed)
        assert self.answered[rows, route].all()  # `needed_routes` of this order was answered
        logits = self.best_logit[rows, route][:, columns]
        chosen = logits.argmax(1)
        column = np.asarray(columns)[chosen]
        log_sum = np.logaddexp.reduce(self.log_sum[rows, route][:, columns], axis=1)
        return Prediction(
            block=np.asarray(candidates)[chosen],
            best=self.best_class[rows, route, column].astype(np.int64),
            confidence=np.exp(logits[rows, chosen] - log_sum),
            routed=routed,
            weight=weight,
        )


def candidate_tasks(label_space: str, task: int, learnt: Sequence[int], num_tasks: int) -> list[int]:
    """The tasks whose classes a test image of `task` may be answered with (method.md, "Label space")."""
    if label_space == "all":
        return list(range(num_tasks))
    if label_space == "seen" and task in learnt:
        return sorted(learnt)
    return [task]


def block_tasks(label_space: str, task: int, num_tasks: int) -> list[int]:
    """The tasks whose classes are the blocks of the table of test set `task`."""
    return [task] if label_space == "task" else list(range(num_tasks))


def needed_routes(
    log_density: np.ndarray, orders: Sequence[Sequence[int]], answering: Answering = "routed"
) -> np.ndarray:
    """bool [N, T + 1]: the routes that images take somewhere along one of the orders, and the frozen model for all.

    Along an order an image is rerouted only when a new task's density beats its best so far.
    """
    n, num_tasks = log_density.shape
    needed = np.zeros((n, num_tasks + 1), bool)
    needed[:, -1] = True
    if answering == "latest":
        needed[:, [task for order in orders for task in order]] = True
    for order in orders if answering == "routed" else []:
        best = np.full(n, -np.inf)
        for task in order:
            beats = log_density[:, task] > best
            needed[beats, task] = True
            best = np.maximum(best, log_density[:, task])
    return needed


def answer(
    predictor: Predictor,
    images: Tensor,
    features: Tensor,
    known: Answers,
    blocks: Sequence[Candidates],
    needed: np.ndarray,
) -> None:
    """Fills into `known` the routes that are needed and not answered yet, one residual pass for each task's images.

    images [N, 3, H, W]; features [N, E] frozen; needed bool [N, T + 1].
    """
    frozen = needed.shape[1] - 1
    for route in range(needed.shape[1]):
        rows = np.flatnonzero(needed[:, route] & ~known.answered[:, route])
        if not len(rows):
            continue
        index = torch.from_numpy(rows)
        task = NO_TASK if route == frozen else route
        weight = torch.from_numpy(known.weight[rows, route]) if task != NO_TASK else torch.zeros(len(rows))
        routes = Routes(torch.full((len(rows),), task), weight, weight)
        for k, logits in enumerate(_block_logits(predictor, images[index], features[index], routes, blocks)):
            known.best_logit[rows, route, k] = logits.max(1).values.numpy()
            known.best_class[rows, route, k] = logits.argmax(1).numpy()
            known.log_sum[rows, route, k] = logits.logsumexp(1).numpy()
        known.answered[rows, route] = True


def predict_along(
    predictor: Predictor,
    images: Tensor,
    features: Tensor,
    blocks: Sequence[Candidates],
    candidates_after: Sequence[Sequence[int]],
    columns_after: Sequence[Sequence[int]],
) -> list[Prediction]:
    """The predictions of one canonical batch after each prefix of the stream, under `batch` routing or by a method
    that answers jointly.

    Not exact by indexing: under `batch` routing the text weight is the batch's mean, and an image keeps the weight of
    its own best density under the voted task; a joint answer depends on all that is learnt. Prefixes that change
    neither the vote nor a weight share one pass.

    candidates_after, columns_after: for each prefix, as in `Answers.predict`.
    """
    passes: dict[tuple[int, bytes], list[Tensor]] = {}
    predictions = []
    for n, (candidates, columns) in enumerate(zip(candidates_after, columns_after, strict=True), start=1):
        routes = predictor.routes(predictor.scores(features, range(n)), "batch")
        key = (int(routes.task[0]), routes.weight.numpy().tobytes())
        if key not in passes:
            passes[key] = list(_block_logits(predictor, images, features, routes, blocks))
        logits = torch.cat([passes[key][k] for k in columns], dim=1)
        if predictor.method.answering == "joint":
            logits = predictor.joint_logits(features, logits, [m for k in columns for m in blocks[k].names], range(n))
        block = torch.cat([torch.full((passes[key][k].shape[1],), t) for t, k in zip(candidates, columns, strict=True)])
        number = torch.cat([torch.arange(passes[key][k].shape[1]) for k in columns])
        best = logits.argmax(1)
        predictions.append(
            Prediction(
                block=block[best].numpy(),
                best=number[best].numpy(),
                confidence=logits.softmax(1).max(1).values.numpy(),
                routed=routes.task.numpy(),
                weight=routes.weight.numpy(),
            )
        )
    return predictions


def _block_logits(
    predictor: Predictor, images: Tensor, features: Tensor, routes: Routes, blocks: Sequence[Candidates]
) -> Iterator[Tensor]:
    prompted = predictor.image_features(images, features, routes)
    for block in blocks:
        yield predictor.logits_of_features(prompted, routes, block)
