"""What is known of each test image, so that its answer after learning any tasks in any order needs no pixel.

The answer over the classes of several data sets is the best of the best classes of each (`Rows`).

Shapes: N images of a test set, M rows, E embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from diki_ray.answering.routing import NO_TASK
from diki_ray.answering.rows import BestClasses, Rows, Wanted
from diki_ray.answering.split_routes import RoutesAfter, SplitRoutes

Names = Sequence[Sequence[str]]
"""For each task its class names."""


@dataclass(eq=False)
class Answers:
    """What is known of one test set."""

    keys: tuple[str, ...]
    sample: np.ndarray  # int64 [N], place in the split; those that could not be read are missing
    labels: np.ndarray  # int64 [N]
    skipped: dict[str, int]
    rows: dict[int, Rows]
    """Each task's module has its rows here; under NO_TASK are the frozen model's, a row for each image."""
    joint: dict[frozenset[int], BestClasses] = field(default_factory=dict)
    """Answers that depend on the whole set of tasks learnt are here, by that set, among all candidates of then."""

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
        """Returns by task the rows that answer all images after each of some sequences of tasks."""
        return needed_rows(self.sample, routes_after, asked)


def needed_rows(sample: np.ndarray, routes_after: RoutesAfter, asked: Sequence[Sequence[int]]) -> dict[int, Wanted]:
    """Returns by task the rows that images [N] of these places need for their answers after each of some sequences of
    tasks."""
    if routes_after.no_module:
        return {}
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

    def correct(self, labels: np.ndarray, task: int, names: Names | None = None) -> np.ndarray:
        """bool [N]: the right class of the data set of `task`; with names also one of its name in another data set."""
        right = (self.block == task) & (self.best == labels)
        if names is None:
            return right
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


def chances(label_space: str, sizes: Sequence[int]) -> list[float]:
    """For each task what guessing gives once all are learnt: 1 / the classes that its test images may be answered with.

    sizes: each task's number of classes.
    """
    tasks = range(len(sizes))
    return [1 / sum(sizes[c] for c in candidate_tasks(label_space, j, tasks, len(sizes))) for j in tasks]


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
