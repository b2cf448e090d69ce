"""Orders by indexing, on made-up answers: many orders in seconds, and the weight's AUROC by hand."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from diki_ray.answering.answers import Answers
from diki_ray.answering.metrics import Metrics
from diki_ray.runs.sweep.trial import by_indexing, spread

NUM_TASKS, NUM_CLASSES = 6, 10


def tables(num_images: int, num_blocks: int = 1) -> list[Answers]:
    """Answers of six test sets, whose densities lean towards their own task."""
    random = np.random.default_rng(0)
    found = []
    for task in range(NUM_TASKS):
        answers = Answers.empty(random.integers(NUM_CLASSES, size=num_images), NUM_TASKS, num_blocks)
        answers.log_density[:] = random.normal(size=answers.log_density.shape)
        answers.log_density[:, task] += 2
        answers.weight[:] = 1 / (1 + np.exp(-answers.log_density))
        answers.answered[:] = True
        answers.best_logit[:] = random.normal(size=answers.best_logit.shape)
        answers.best_class[:] = random.integers(NUM_CLASSES, size=answers.best_class.shape)
        answers.log_sum[:] = answers.best_logit + 0.1
        found.append(answers)
    return found


NAMES = [[f"{t}.{c}" for c in range(NUM_CLASSES)] for t in range(NUM_TASKS)]


@pytest.mark.parametrize(("label_space", "num_blocks"), [("task", 1), ("all", NUM_TASKS)])
def test_720_orders_of_6_tasks_take_seconds(label_space: str, num_blocks: int) -> None:
    orders = {str(p): p for p in itertools.permutations(range(NUM_TASKS))}
    answers = tables(500, num_blocks)
    started = time.process_time()
    found = by_indexing(answers, NAMES, label_space, orders)
    assert time.process_time() - started < 15  # about 1 s when nothing else runs
    assert len(found) == 720
    last = {name: Metrics.of(o.accuracy).mean("last") for name, o in found.items()}
    assert max(last.values()) - min(last.values()) < 1e-12  # what is known at the end does not depend on the order
    assert len({round(Metrics.of(o.accuracy).mean("transfer"), 9) for o in found.values()}) > 100


def test_a_matrix_and_its_auroc_by_hand() -> None:
    answers, order = tables(50), (4, 0, 2, 5, 1, 3)
    found = by_indexing(answers, NAMES, "task", {"x": order})["x"]
    areas = []
    for step in range(1, NUM_TASKS + 1):
        learnt = list(order[:step])
        weights, known = [], []
        for j in range(NUM_TASKS):
            best = [max(learnt, key=lambda t, n=n, j=j: answers[j].log_density[n, t]) for n in range(50)]
            right = [answers[j].best_class[n, t, 0] == answers[j].labels[n] for n, t in enumerate(best)]
            assert found.accuracy[step - 1, order.index(j)] == pytest.approx(np.mean(right))
            weights += [answers[j].weight[n, t] for n, t in enumerate(best)]
            known += [j in learnt] * 50
        if step < NUM_TASKS:
            areas.append(roc_auc_score(known, weights))
    assert found.weight_auroc == pytest.approx(np.mean(areas))


def test_a_stream_of_one_task_has_neither_transfer_nor_auroc() -> None:
    metrics = by_indexing(tables(20)[:1], NAMES[:1], "task", {"x": (0,)})["x"].metrics()
    assert metrics["transfer"] is None
    assert metrics["weight_auroc"] is None
    assert metrics["last"] is not None


def test_mean_and_standard_deviation() -> None:
    assert spread([1.0, 2.0, None, 3.0]) == {"mean": 2.0, "std": 1.0}
    assert spread([0.5]) == {"mean": 0.5, "std": None}
    assert spread([None]) == {"mean": None, "std": None}
