"""Orders by indexing, on made-up answers: many orders in seconds, and the weight's AUROC by hand."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from diki_ray.answering.answers import Answers
from diki_ray.answering.evaluation import Evaluation
from diki_ray.answering.routing import NO_TASK
from diki_ray.answering.rows import BestClasses, Rows, Wanted
from diki_ray.answering.split_routes import RoutesAfter, SplitRoutes
from diki_ray.runs.sweep.trial import figures_of, spread

NUM_TASKS, NUM_CLASSES = 6, 10


def made_up(num_images: int, label_space: str = "task", num_tasks: int = NUM_TASKS) -> Evaluation:
    """Answers of test sets whose densities lean towards their own task."""
    random = np.random.default_rng(0)
    answers, routes = [], []
    for task in range(num_tasks):
        log_density = random.normal(size=(num_images, num_tasks))
        log_density[:, task] += 2
        weight = 1 / (1 + np.exp(-log_density))
        rows = {}
        for t in range(NO_TASK, num_tasks):
            own = np.zeros(num_images) if t == NO_TASK else weight[:, t]
            best = random.normal(size=(num_tasks, num_images)).astype(np.float32)
            scores = {
                str(c): BestClasses(b, random.integers(NUM_CLASSES, size=num_images), b + np.float32(0.1))
                for c, b in enumerate(best)
            }
            rows[t] = Rows(Wanted(np.arange(num_images), own, own), np.zeros((num_images, 1), np.float32), scores)
        labels = random.integers(NUM_CLASSES, size=num_images)
        answers.append(Answers(("",) * num_images, np.arange(num_images), labels, {}, rows))
        routes.append(densest(log_density, weight))
    return Evaluation(answers, NAMES[:num_tasks], label_space, routes, lambda task, c: str(c))


def densest(log_density: np.ndarray, weight: np.ndarray) -> RoutesAfter:
    n = np.arange(len(log_density))

    def ask(learnt: tuple[int, ...]) -> SplitRoutes:
        task = np.asarray(learnt)[log_density[:, learnt].argmax(1)] if learnt else np.full(len(n), NO_TASK)
        own = weight[n, task] if learnt else np.zeros(len(n))
        return SplitRoutes(task, own, own, task)

    return RoutesAfter(ask)


NAMES = [[f"{t}.{c}" for c in range(NUM_CLASSES)] for t in range(NUM_TASKS)]


@pytest.mark.parametrize("label_space", ["task", "all"])
def test_720_orders_of_6_tasks_take_seconds(label_space: str) -> None:
    evaluation, orders = made_up(500, label_space), list(itertools.permutations(range(NUM_TASKS)))
    started = time.process_time()
    found = [figures_of(evaluation, order) for order in orders]
    assert time.process_time() - started < 15  # about 1 s when nothing else runs
    assert len(found) == 720
    last = [figures["last"] for figures in found]
    assert max(last) - min(last) < 1e-12  # what is known at the end does not depend on the order
    assert len({round(figures["transfer"], 9) for figures in found}) > 100


def test_every_set_of_tasks_is_routed_and_asked_about_once() -> None:
    evaluation, asked = made_up(20), Counter()
    for j, routes in enumerate(evaluation.routes):
        routes._ask = counted(j, routes._ask, asked)
    for order in itertools.permutations(range(4)):
        figures_of(evaluation, order)
    assert len({learnt for _, learnt in asked}) == 16  # of four tasks, the empty one included
    assert set(asked.values()) == {1}  # by test set


def counted(j: int, ask: Callable[[tuple[int, ...]], SplitRoutes], asked: Counter) -> Callable[..., SplitRoutes]:
    def counting(learnt: tuple[int, ...]) -> SplitRoutes:
        asked[j, frozenset(learnt)] += 1
        return ask(learnt)

    return counting


def test_a_matrix_and_its_auroc_by_hand() -> None:
    evaluation, order = made_up(50), (4, 0, 2, 5, 1, 3)
    accuracy, areas = evaluation.accuracy(order), []
    for step in range(1, NUM_TASKS + 1):
        learnt = order[:step]
        weights, known = [], []
        for j, answers in enumerate(evaluation.test_sets):
            own = [max(learnt, key=lambda t, n=n, a=answers: a.rows[t].wanted.weight[n]) for n in range(50)]
            right = [answers.rows[t].scores[str(j)].best_class[n] == answers.labels[n] for n, t in enumerate(own)]
            assert accuracy[step - 1, order.index(j)] == pytest.approx(np.mean(right))
            weights += [answers.rows[t].wanted.weight[n] for n, t in enumerate(own)]
            known += [j in learnt] * 50
        if step < NUM_TASKS:
            areas.append(roc_auc_score(known, weights))
    assert figures_of(evaluation, order)["weight_auroc"] == pytest.approx(np.mean(areas))


def test_what_is_kept_away_until_the_end_is_answered_once_all_others_are_learnt() -> None:
    evaluation, last = made_up(50), NUM_TASKS - 1
    order = tuple(range(NUM_TASKS))
    assert figures_of(evaluation, order, held_out=last)["never_seen"] == evaluation.accuracy(order)[-2, -1]
    assert figures_of(evaluation, order[::-1], held_out=last)["never_seen"] is None  # it is learnt first
    assert "never_seen" not in figures_of(evaluation, order)


def test_a_stream_of_one_task_has_neither_transfer_nor_auroc() -> None:
    figures = figures_of(made_up(20, num_tasks=1), (0,))
    assert figures["transfer"] is None
    assert figures["weight_auroc"] is None
    assert figures["last"] is not None


def test_mean_and_standard_deviation() -> None:
    assert spread([1.0, 2.0, None, 3.0]) == {"mean": 2.0, "std": 1.0}
    assert spread([0.5]) == {"mean": 0.5, "std": None}
    assert spread([None]) == {"mean": None, "std": None}
