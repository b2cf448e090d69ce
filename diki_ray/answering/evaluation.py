"""The one object that holds the answers of a stream's test sets: everything that is reported is a view of it.

What an image is answered with after some tasks does not depend on the order in which they were learnt, but for ties
between routes and for methods that answer with the last. So figures are kept by the set of tasks learnt: 720 orders of
6 tasks are 64 sets.

Shapes: T tasks and test sets, N images of a test set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from diki_ray.answering.answers import Answers, Names, Prediction, candidate_tasks, predict
from diki_ray.answering.figures import TestSet, auroc
from diki_ray.answering.routing import NO_TASK
from diki_ray.answering.split_routes import Learnt, RoutesAfter, SplitRoutes


@dataclass(eq=False)
class Evaluation:
    """The answers of all test sets of a stream, after any of the tasks and orders that were asked for.

    names: each task's class names. routes: of each test set. key_of: see `predict`.
    """

    test_sets: Sequence[Answers]
    names: Names
    label_space: str
    routes: Sequence[RoutesAfter]
    key_of: Callable[[int, int], str]
    text_feature_error: float = 0.0
    """The largest error of the tabulated class features that answers rest on."""
    _accuracies: dict[tuple[int, Learnt], float] = field(default_factory=dict)
    _areas: dict[Learnt, float | None] = field(default_factory=dict)
    _last: dict[int, tuple[SplitRoutes, list[int], Prediction]] = field(default_factory=dict)

    def predict(self, task: int, learnt: Sequence[int]) -> Prediction:
        """The predictions of test set `task` once `learnt` are learnt, in that order."""
        answers, routes = self.test_sets[task], self.routes[task](learnt)
        candidates = candidate_tasks(self.label_space, task, learnt, len(self.names))
        if task in self._last and not answers.joint:  # most tasks change neither routes nor candidates of a test set
            before, among, prediction = self._last[task]
            if before is routes and among == candidates:
                return prediction
        prediction = predict(answers, routes, learnt, candidates, self.key_of, self.names)
        self._last[task] = routes, candidates, prediction
        return prediction

    def correct(self, task: int, prediction: Prediction) -> np.ndarray:
        """bool [N]: which images of test set `task` were answered rightly.

        Where two data sets have a class of one name, X-TAIL ("all") counts only the one of the image's own data set,
        as RAIL's public code does (docs/faq.md); "seen" counts either.
        """
        names = None if self.label_space == "all" else self.names
        return prediction.correct(self.test_sets[task].labels, task, names)

    def accuracy_of(self, task: int, learnt: Sequence[int]) -> float:
        """Accuracy on test set `task` once `learnt` are learnt."""
        key = (task, self.routes[task].key(learnt))
        if key not in self._accuracies:
            self._accuracies[key] = float(self.correct(task, self.predict(task, learnt)).mean())
        return self._accuracies[key]

    def accuracy(self, order: Sequence[int] | None = None) -> np.ndarray:
        """A [T, T], rows and columns in the order given (by default the stream's): A[i, j] on order[j] after learning
        order[: i + 1]."""
        order = range(len(self.names)) if order is None else order
        return np.array([[self.accuracy_of(j, order[: i + 1]) for j in order] for i in range(len(order))])

    def zero_shot(self, order: Sequence[int] | None = None) -> np.ndarray:
        """[T], in the order given: nothing learnt."""
        return np.array([self.accuracy_of(j, ()) for j in (range(len(self.names)) if order is None else order)])

    def weight_auroc(self, order: Sequence[int]) -> list[float | None]:
        """How well the integration weight tells images of learnt domains from others, after each task of an order; None
        where there are no others."""
        found, tests = [], range(len(self.names))
        for n in range(1, len(order) + 1):
            learnt = order[:n]
            keys = {self.routes[j].key(learnt) for j in tests}
            key = keys.pop() if len(keys) == 1 else tuple(learnt)
            if key not in self._areas:
                self._areas[key] = auroc([self.routes[j](learnt).weight for j in tests], [j in learnt for j in tests])
            found.append(self._areas[key])
        return found

    def along(self, order: Sequence[int], task_names: Sequence[str], data: Sequence[str]) -> tuple[TestSet, ...]:
        """The answers after 0 … n tasks of an order, of its test sets and then of those that are not learnt.

        task_names, data: the name and the data's digest of each test set of the stream.
        """
        unlearnt = [t for t in range(len(self.names)) if t not in order]
        place = {NO_TASK: NO_TASK} | {task: n for n, task in enumerate(order)}
        sets = []
        for j in (*order, *unlearnt):
            answers = self.test_sets[j]
            after = [self.predict(j, order[:n]) for n in range(len(order) + 1)]
            sets.append(
                TestSet(
                    name=task_names[j],
                    class_names=tuple(self.names[j]),
                    data=data[j],
                    keys=answers.keys,
                    labels=answers.labels,
                    learnt_at=place.get(j),
                    correct=np.stack([self.correct(j, p) for p in after]),
                    confidence=np.stack([p.confidence for p in after]),
                    routed=np.stack([np.array([place[t] for t in p.routed.tolist()]) for p in after]),
                    weight=np.stack([p.weight for p in after]),
                )
            )
        return tuple(sets)
