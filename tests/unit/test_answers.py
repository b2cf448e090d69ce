"""The matrix by indexing equals evaluating every cell afresh, for any order, label space and routing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from diki_ray.answering.orders import Orders
from golden import Golden

from diki_ray.answering.answers import (
    Answers,
    answer,
    block_tasks,
    candidate_tasks,
    needed_routes,
    predict_along,
)
from diki_ray.answering.gaussians import Gaussians
from diki_ray.answering.predictor import Candidates, Predictor
from diki_ray.answering.routing import Published

GOLDEN = Golden.load()
T = GOLDEN.num_tasks
MODULES = [GOLDEN.module(t) for t in range(T)]
BLOCKS = [Candidates.of(GOLDEN.backbone, m.class_names, m.templates) for m in MODULES]


def make_predictor(learnt: tuple[int, ...] = tuple(range(T)), text_grid: int = 5, scale: float = 60.0) -> Predictor:
    """Scale 60, where weights differ between images (with the published 512 this tiny model's hardly do)."""
    modules = [MODULES[t] for t in learnt]
    return Predictor(GOLDEN.method, modules, Gaussians([m.moments for m in modules]), Published(scale), text_grid)


def table(predictor: Predictor, task: int, space: str, orders) -> Answers:
    images, labels = GOLDEN[f"task{task}.test.images"], GOLDEN[f"task{task}.test.labels"].numpy()
    features = predictor.frozen_features(images)
    blocks = [BLOCKS[t] for t in block_tasks(space, task, T)]
    answers = Answers.empty(labels, T, len(blocks))
    densities = predictor.log_density(features)
    answers.log_density[:] = densities.numpy()
    for t in range(T):
        answers.weight[:, t] = predictor.calibration.weight(densities[:, t], torch.full((len(labels),), t)).numpy()
    answer(predictor, images, features, answers, blocks, needed_routes(answers.log_density, orders))
    return answers


@pytest.mark.parametrize("space", ["task", "seen", "all"])
def test_every_order_by_indexing_equals_evaluating_each_cell_afresh(space: str) -> None:
    orders = list(itertools.permutations(range(T)))
    whole = make_predictor()
    cells = {}
    for task in range(T):
        images, frozen = GOLDEN[f"task{task}.test.images"], whole.frozen_features(GOLDEN[f"task{task}.test.images"])
        answers = table(whole, task, space, orders)
        block_of = block_tasks(space, task, T)
        for order in orders:
            for n in range(T + 1):
                learnt = order[:n]
                candidates = candidate_tasks(space, task, learnt, T)
                by_index = answers.predict(learnt, candidates, [block_of.index(t) for t in candidates])
                if not learnt:
                    continue
                if learnt not in cells:
                    cells[learnt] = make_predictor(learnt)
                # Afresh: a predictor that only has the learnt modules.
                alone = cells[learnt]
                routes = alone.route(alone.log_density(frozen), "image")
                logits = torch.cat([alone.logits(images, frozen, routes, BLOCKS[t]) for t in candidates], 1)
                owners = np.concatenate([[t] * len(MODULES[t].class_names) for t in candidates])
                numbers = np.concatenate([np.arange(len(MODULES[t].class_names)) for t in candidates])
                best = logits.argmax(1).numpy()
                assert by_index.routed.tolist() == [learnt[r] for r in routes.task.tolist()]
                np.testing.assert_allclose(by_index.weight, routes.weight, atol=1e-12)
                assert by_index.block.tolist() == owners[best].tolist()
                assert by_index.best.tolist() == numbers[best].tolist()
                np.testing.assert_allclose(by_index.confidence, logits.softmax(1).max(1).values, atol=1e-4)


@pytest.mark.parametrize("space", ["task", "seen", "all"])
def test_matrices_of_all_orders_are_those_of_the_predictions(space: str) -> None:
    orders = list(itertools.permutations(range(T)))
    predictor = make_predictor()
    tables = [table(predictor, task, space, orders) for task in range(T)]
    names = [m.class_names for m in MODULES]
    by_set = Orders(tables, names, space)
    for order in orders:
        expected = np.zeros((T, T))
        for i in range(T):
            for column, j in enumerate(order):
                learnt = order[: i + 1]
                candidates, block_of = candidate_tasks(space, j, learnt, T), block_tasks(space, j, T)
                prediction = tables[j].predict(learnt, candidates, [block_of.index(t) for t in candidates])
                expected[i, column] = prediction.correct(tables[j].labels, j, names).mean()
        np.testing.assert_array_equal(by_set.accuracy(order), expected)


def test_a_tie_between_two_tasks_goes_to_the_one_learnt_first() -> None:
    answers = Answers.empty(np.array([0]), num_tasks=2, num_blocks=1)
    answers.answered[:] = True
    answers.best_class[0, :, 0] = [0, 1, 1]  # task 0 is right, task 1 and the frozen model are wrong
    answers.best_logit[:] = answers.log_sum[:] = 0
    orders = Orders([answers, answers], [["a", "b"], ["c", "d"]], "task")
    assert orders.of_task(0, (0, 1)) == 1.0
    assert orders.of_task(0, (1, 0)) == 0.0


def test_fewer_residual_passes_than_evaluating_each_cell() -> None:
    answers = table(make_predictor(), 1, "task", [range(T)])
    needed = needed_routes(answers.log_density, [range(T)])
    assert needed[:, :-1].sum() < needed[:, :-1].size
    assert needed[:, -1].all()
    best = answers.log_density.argmax(1)
    assert needed[np.arange(len(best)), best].all()


@pytest.mark.parametrize("space", ["task", "seen", "all"])
def test_batch_routing_along_the_stream_equals_each_prefix_alone(space: str) -> None:
    whole = make_predictor()
    for task in range(T):
        images = GOLDEN[f"task{task}.test.images"]
        frozen = whole.frozen_features(images)
        block_of = block_tasks(space, task, T)
        after = [candidate_tasks(space, task, range(n), T) for n in range(1, T + 1)]
        columns = [[block_of.index(t) for t in c] for c in after]
        along = predict_along(whole, images, frozen, [BLOCKS[t] for t in block_of], after, columns)
        for n, (candidates, prediction) in enumerate(zip(after, along, strict=True), start=1):
            alone = make_predictor(tuple(range(n)))
            routes = alone.route(alone.log_density(frozen), "batch")
            logits = torch.cat([alone.logits(images, frozen, routes, BLOCKS[t]) for t in candidates], 1)
            owners = np.concatenate([[t] * len(MODULES[t].class_names) for t in candidates])
            assert prediction.block.tolist() == owners[logits.argmax(1).numpy()].tolist()
            assert prediction.routed.tolist() == routes.task.tolist()


def test_the_same_name_in_another_data_set_counts_as_right() -> None:
    answers = table(make_predictor(), 0, "all", [range(T)])
    prediction = answers.predict(range(T), range(T), range(T))
    names = [["x"] * len(m.class_names) for m in MODULES]
    assert prediction.correct(answers.labels, 0, names).all()
    distinct = [[f"{t}.{c}" for c in range(len(m.class_names))] for t, m in enumerate(MODULES)]
    right = (prediction.block == 0) & (prediction.best == answers.labels)
    assert prediction.correct(answers.labels, 0, distinct).tolist() == right.tolist()


def test_interpolated_class_features_have_the_error_they_state() -> None:
    exact, tabulated = make_predictor(text_grid=0), make_predictor(text_grid=33)
    for task in range(T):
        images = GOLDEN[f"task{task}.test.images"]
        frozen = exact.frozen_features(images)
        routes = exact.route(exact.log_density(frozen), "image")
        difference = (
            tabulated.logits(images, frozen, routes, BLOCKS[task]) - exact.logits(images, frozen, routes, BLOCKS[task])
        ).abs()
        scale = float(GOLDEN.backbone.model.logit_scale.exp())
        stated = max(tabulated.interpolation_error(t, BLOCKS[task]) for t, _ in tabulated.tables())
        embed_dim = GOLDEN.meta["embed_dim"]
        assert difference.max() <= scale * stated * embed_dim**0.5 + 1e-4  # Cauchy–Schwarz, and float32 rounding
        assert stated < 1e-3


def test_a_finer_grid_states_a_smaller_error() -> None:
    errors = []
    for grid in (5, 17, 65):
        predictor = make_predictor(text_grid=grid)
        errors.append(predictor.interpolation_error(0, BLOCKS[0]))
    assert errors[0] > errors[1] > errors[2]


def test_images_below_skip_weight_get_the_frozen_answer() -> None:
    predictor = make_predictor()
    images = GOLDEN["task0.test.images"]
    frozen = predictor.frozen_features(images)
    routes = predictor.route(predictor.log_density(frozen), "image")
    predictor.skip_weight = float(routes.weight.median())
    logits = predictor.logits(images, frozen, routes, BLOCKS[0])
    zero_shot = GOLDEN.backbone.logits(frozen, GOLDEN["task0.zero_shot.text_features"])
    skipped = routes.weight < predictor.skip_weight
    assert 0 < skipped.sum() < len(images)
    torch.testing.assert_close(logits[skipped], zero_shot[skipped], atol=1e-4, rtol=0)
    assert (logits[~skipped] - zero_shot[~skipped]).abs().max() > 1e-3
