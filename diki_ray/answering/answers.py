"""What is known of each test image, so that its answer after learning any tasks in any order needs no pixel.

An answer is decided by the image's feature under the module that answers it, at the integration weight that its route
gives it. So what is kept are rows (image, module, weights): the feature, and for each data set whose classes were
candidates the best of them. The answer over the classes of several data sets is the best of their bests.

Shapes: N images of a test set, M rows, E embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np

from diki_ray.answering.routing import NO_TASK
from diki_ray.answering.split_routes import RoutesAfter, SplitRoutes

Names = Sequence[Sequence[str]]
"""For each task its class names."""

TOLERANCE = 1e-6
"""Weights that differ by less are one: another processor sums a density up in another order."""


class Wanted(NamedTuple):
    """Rows of one module: which images, and at which weights."""

    sample: np.ndarray  # int64 [M], place in the split
    weight: np.ndarray  # float64 [M]
    text_weight: np.ndarray  # float64 [M]

    def take(self, rows: np.ndarray) -> Wanted:
        return Wanted(self.sample[rows], self.weight[rows], self.text_weight[rows])


@dataclass(frozen=True, eq=False)
class BestClasses:
    """The best of some candidate classes for each row; NaN where it is not known."""

    best_logit: np.ndarray  # float32 [M]
    best_class: np.ndarray  # int32 [M], its place among the candidates
    log_sum: np.ndarray  # float32 [M], logsumexp over the candidates' logits: confidences follow from it
    error: float = 0.0
    """The largest error of the tabulated class features that were used."""
    ARRAYS: ClassVar = ("best_logit", "best_class", "log_sum")

    @staticmethod
    def unknown(num_rows: int) -> BestClasses:
        nan = np.full(num_rows, np.nan, np.float32)
        return BestClasses(nan, np.full(num_rows, -1, np.int32), nan.copy())

    @staticmethod
    def joined(parts: Sequence[BestClasses]) -> BestClasses:
        columns = {name: np.concatenate([vars(p)[name] for p in parts]) for name in BestClasses.ARRAYS}
        return BestClasses(**columns, error=max(p.error for p in parts))

    def take(self, rows: np.ndarray) -> BestClasses:
        return BestClasses(self.best_logit[rows], self.best_class[rows], self.log_sum[rows], self.error)

    def with_rows(self, rows: np.ndarray, found: BestClasses) -> BestClasses:
        """With what was found for some of the rows."""
        columns = {name: vars(self)[name].copy() for name in BestClasses.ARRAYS}
        for name, column in columns.items():
            column[rows] = vars(found)[name]
        return BestClasses(**columns, error=max(self.error, found.error))


@dataclass(frozen=True, eq=False)
class Rows:
    """What one module says of some images of a test set, ordered by image and weight."""

    wanted: Wanted
    feature: np.ndarray  # float32 [M, E]
    scores: Mapping[str, BestClasses] = field(default_factory=dict)
    """By the key of the candidates (and of how exact their class features are)."""

    def __len__(self) -> int:
        return len(self.wanted.sample)

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        order = np.lexsort([np.concatenate(c) for c in zip(*(p.wanted[::-1] for p in parts), strict=True)])
        keys = {key for p in parts for key in p.scores}
        scores = {
            k: BestClasses.joined([p.scores.get(k) or BestClasses.unknown(len(p)) for p in parts]) for k in sorted(keys)
        }
        wanted = Wanted(*(np.concatenate(c) for c in zip(*(p.wanted for p in parts), strict=True)))
        return Rows(wanted, np.concatenate([p.feature for p in parts]), scores).take(order)

    def take(self, rows: np.ndarray) -> Rows:
        return Rows(self.wanted.take(rows), self.feature[rows], {k: s.take(rows) for k, s in self.scores.items()})

    def find(self, wanted: Wanted, whatever_text: bool = False) -> np.ndarray:
        """int64 [M]: the rows of these images at these weights, −1 where there is none."""
        place = 2 * self.wanted.sample + self.wanted.weight  # weights are at most 1
        aim = 2 * wanted.sample + wanted.weight
        at, found = np.searchsorted(place, aim - TOLERANCE), np.full(len(aim), -1)
        left = np.arange(len(aim))
        while len(left := left[at[left] < len(place)]):
            left = left[place[at[left]] <= aim[left] + TOLERANCE]
            away = np.abs(self.wanted.text_weight[at[left]] - wanted.text_weight[left])
            hit = (away <= TOLERANCE) | whatever_text
            found[left[hit]] = at[left[hit]]
            left = left[~hit]
            at[left] += 1
        return found

    def without_other_weights(self, used: np.ndarray) -> Rows:
        """Without rows of images whose row at another weight is used instead: those of another calibration."""
        mask = np.zeros(len(self), bool)
        mask[used] = True
        return self.take(np.flatnonzero(mask | ~np.isin(self.wanted.sample, self.wanted.sample[mask])))


@dataclass(eq=False)
class Answers:
    """What is known of one test set."""

    keys: tuple[str, ...]
    sample: np.ndarray  # int64 [N], place in the split; those that could not be read are missing
    labels: np.ndarray  # int64 [N]
    skipped: dict[str, int]
    rows: dict[int, Rows]
    """By the task whose module it is; NO_TASK: the frozen model's, a row for each image."""
    joint: dict[frozenset[int], BestClasses] = field(default_factory=dict)
    """Of a method that answers jointly: after some tasks, among all candidates of then."""

    @property
    def frozen(self) -> np.ndarray:
        """float32 [N, E]."""
        return self.rows[NO_TASK].feature

    def batch_sizes(self, batch_size: int) -> list[int]:
        """Images of each canonical batch that has any."""
        return np.unique(self.sample // batch_size, return_counts=True)[1].tolist()

    def wanted(self, routes: SplitRoutes, rows: np.ndarray) -> Wanted:
        """The rows of their modules that some of the images are answered from."""
        learnt = routes.module[rows] != NO_TASK
        return Wanted(
            self.sample[rows], np.where(learnt, routes.weight[rows], 0), np.where(learnt, routes.text_weight[rows], 0)
        )

    def needed(self, routes_after: RoutesAfter, asked: Sequence[Sequence[int]]) -> dict[int, Wanted]:
        """By task the rows that answer all images after each of some sequences of tasks."""
        return needed_rows(self.sample, routes_after, asked)


def needed_rows(sample: np.ndarray, routes_after: RoutesAfter, asked: Sequence[Sequence[int]]) -> dict[int, Wanted]:
    """By task the rows that images [N] of these places need to be answered after each of some sequences of tasks."""
    found: dict[int, list[np.ndarray]] = {}
    seen, before = set(), None
    for learnt in asked:
        routes = routes_after(learnt)
        if id(routes) in seen:
            continue
        seen.add(id(routes))
        now = np.stack([routes.module, routes.weight, routes.text_weight])
        # Learning one more task changes few routes: what is as it was before is asked for already.
        changed = np.flatnonzero(np.ones(len(sample), bool) if before is None else (now != before).any(0))
        before = now
        for task in np.unique(routes.module[changed]).tolist():
            rows = changed[routes.module[changed] == task]
            if task != NO_TASK:
                found.setdefault(task, []).append(np.stack([sample[rows], *now[1:, rows]]))
    wanted = {}
    for task, parts in sorted(found.items()):
        place, weight, text_weight = np.unique(np.concatenate(parts, axis=1), axis=1)
        wanted[task] = Wanted(place.astype(np.int64), weight, text_weight)
    return wanted


@dataclass(frozen=True, eq=False)
class Prediction:
    """What N images were answered with: the class `best` of the data set of task `block`, and how it came about."""

    block: np.ndarray  # int64 [N]
    best: np.ndarray  # int64 [N]
    confidence: np.ndarray  # float32 [N], softmax probability among the candidates
    routed: np.ndarray  # int64 [N], NO_TASK: no task
    weight: np.ndarray  # float64 [N], the image's integration weight

    def correct(self, labels: np.ndarray, task: int, names: Names) -> np.ndarray:
        """bool [N]: the right class, or one of the right class's name in another data set."""
        right = (self.block == task) & (self.best == labels)
        for n in np.flatnonzero(self.block != task):
            right[n] = names[self.block[n]][self.best[n]] == names[task][labels[n]]
        return right


def candidate_tasks(label_space: str, task: int, learnt: Sequence[int], num_tasks: int) -> list[int]:
    """The tasks whose classes a test image of `task` may be answered with (method.md, "Label space")."""
    if label_space == "all":
        return list(range(num_tasks))
    if label_space == "seen" and task in learnt:
        return sorted(learnt)
    return [task]


def predict(
    answers: Answers,
    routes: SplitRoutes,
    learnt: Sequence[int],
    candidates: Sequence[int],
    key_of: Callable[[int, int], str],
    names: Names,
) -> Prediction:
    """The predictions among the classes of the data sets of tasks `candidates`, once `learnt` are learnt.

    key_of: the key of the scores of a task's module among the classes of a data set.
    """
    n = np.arange(len(answers.labels))
    sizes = [len(names[c]) for c in candidates]
    if learnt and answers.joint:
        found = answers.joint[frozenset(learnt)]
        best, first = found.best_class.astype(np.int64), np.cumsum([0, *sizes])
        column = np.searchsorted(first, best, side="right") - 1
        logit, number, log_sum = found.best_logit, best - first[column], found.log_sum
    else:
        logits, sums = (np.full((len(n), len(candidates)), np.nan, np.float32) for _ in range(2))
        classes = np.zeros((len(n), len(candidates)), np.int64)
        for task in np.unique(routes.module).tolist():
            images = np.flatnonzero(routes.module == task)
            rows = answers.rows[task].find(answers.wanted(routes, images))
            for k, c in enumerate(candidates):
                scores = answers.rows[task].scores[key_of(task, c)].take(rows)
                logits[images, k], classes[images, k], sums[images, k] = (
                    scores.best_logit, scores.best_class, scores.log_sum,
                )  # fmt: skip
        assert not np.isnan(logits).any()  # the rows of these tasks were asked for
        column = logits.argmax(1)
        logit, number = logits[n, column], classes[n, column]
        log_sum = np.logaddexp.reduce(sums, axis=1) if len(candidates) else sums
    return Prediction(
        block=np.asarray(candidates)[column],
        best=number,
        confidence=np.exp(logit - log_sum),
        routed=routes.task,
        weight=routes.weight,
    )
