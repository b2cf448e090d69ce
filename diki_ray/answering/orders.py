"""The accuracy matrix of any order of the tasks, from the answers of all test sets, by indexing.

What an image is answered with after some tasks does not depend on the order in which they were learnt, but for ties
between densities. So accuracies are kept by the set of tasks learnt: 720 orders of 6 tasks are 64 sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from diki_ray.answering.answers import Answers, Names, block_tasks, candidate_tasks


@dataclass(eq=False)
class Orders:
    """Accuracies under `image` routing for test sets whose tables answer the routes that are asked for.

    tables: for each task its test set's answers; names: its class names.
    """

    tables: Sequence[Answers]
    names: Names
    label_space: str
    _known: dict[tuple[int, frozenset[int], int | None], float] = field(default_factory=dict)

    def accuracy(self, order: Sequence[int]) -> np.ndarray:
        """A [T, T], rows and columns in the order given: A[i, j] on order[j] after learning order[: i + 1]."""
        t = len(order)
        return np.array([[self.of_task(order[j], order[: i + 1]) for j in range(t)] for i in range(t)])

    def zero_shot(self, order: Sequence[int]) -> np.ndarray:
        """[T], in the order given: nothing learnt."""
        return np.array([self.of_task(j, ()) for j in order])

    def weights(self, task: int, learnt: Sequence[int]) -> np.ndarray:
        """[N]: the integration weights of one test set's images once `learnt` (at least one) are learnt."""
        return self.tables[task].routes(learnt)[1]

    def of_task(self, task: int, learnt: Sequence[int]) -> float:
        """Accuracy on one test set once `learnt` are learnt."""
        table, num_tasks = self.tables[task], len(self.tables)
        latest = learnt[-1] if table.answering == "latest" and len(learnt) else None
        key = (task, frozenset(learnt), latest)
        if key in self._known:
            return self._known[key]
        candidates = candidate_tasks(self.label_space, task, learnt, num_tasks)
        block_of = block_tasks(self.label_space, task, num_tasks)
        prediction = table.predict(list(learnt), candidates, [block_of.index(c) for c in candidates])
        accuracy = float(prediction.correct(table.labels, task, self.names).mean())
        if not self._tied(table, learnt):
            self._known[key] = accuracy
        return accuracy

    @staticmethod
    def _tied(table: Answers, learnt: Sequence[int]) -> bool:
        """Whether an image has two best tasks: then the order within the set decides."""
        if len(learnt) < 2 or table.answering != "routed":
            return False
        densities = table.log_density[:, list(learnt)]
        return bool(((densities == densities.max(1, keepdims=True)).sum(1) > 1).any())
