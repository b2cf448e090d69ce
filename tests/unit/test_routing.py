"""Routes and integration weights (method.md, "Inference"), and the metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diki_ray.answering.gaussians import Gaussians
from diki_ray.answering.metrics import Metrics
from diki_ray.answering.routing import NO_TASK, GaussianRouter, Published, Routes, Routing, Scores, Validated
from diki_ray.learning.moments import Moments

PUBLISHED = Published(scale=2.0, bias=-1.0)
DENSITIES = torch.tensor([[4.0, 1.0, 0.0], [0.0, 6.0, 6.0], [3.0, -2.0, 1.0]], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def routed(densities: torch.Tensor, routing: Routing) -> Routes:
    learnt = range(densities.shape[1])
    return Scores(learnt, densities, PUBLISHED.weight(densities, torch.arange(len(learnt)))).routes(routing)


def test_image_routing_takes_the_best_density_and_ties_go_to_the_lowest_task() -> None:
    routes = routed(DENSITIES, "image")
    assert routes.task.tolist() == [0, 1, 0]
    np.testing.assert_allclose(routes.weight, [sigmoid(1), sigmoid(2), sigmoid(0.5)])
    assert torch.equal(routes.text_weight, routes.weight)


def test_batch_routing_votes_but_keeps_each_images_own_weight() -> None:
    routes = routed(DENSITIES, "batch")
    assert routes.task.tolist() == [0, 0, 0]
    weights = [sigmoid(1), sigmoid(2), sigmoid(0.5)]  # image 1 keeps the weight of task 1's density
    np.testing.assert_allclose(routes.weight, weights)
    np.testing.assert_allclose(routes.text_weight, [sum(weights) / 3] * 3)
    tie = routed(DENSITIES[:2], "batch")
    assert tie.task.tolist() == [0, 0]


def test_nothing_learnt_routes_nowhere() -> None:
    routes = routed(torch.zeros(2, 0, dtype=torch.float64), "image")
    assert routes.task.tolist() == [NO_TASK, NO_TASK]
    assert routes.weight.tolist() == [0, 0]


def test_far_from_everything_learnt_the_weight_is_zero() -> None:
    assert float(PUBLISHED.weight(torch.tensor(-1e6, dtype=torch.float64), torch.tensor(0))) == 0.0


def test_validated_calibration_means_the_same_at_every_scale() -> None:
    """Two tasks whose densities differ by a hundred in location and spread give their own images the same weights."""
    rng = np.random.default_rng(0)
    moments = [Moments.of(rng.normal(size=(500, 4)) * s) for s in (0.01, 1.0)]
    gaussians = Gaussians(moments)
    validation = [torch.from_numpy(rng.normal(size=(400, 4)) * s) for s in (0.01, 1.0)]
    calibration = Validated.from_validation(gaussians, validation, slope=1.0, bias=4.0)
    means = []
    for t, features in enumerate(validation):
        s = gaussians.log_density(features)[:, t]
        means.append(float(calibration.weight(s, torch.full((400,), t)).mean()))
    assert abs(means[0] - means[1]) < 0.01
    assert means[0] > 0.95
    outside = gaussians.log_density(torch.ones(1, 4, dtype=torch.float64) * 30)[:, 1]
    assert float(calibration.weight(outside, torch.tensor([1]))) < 1e-6
    with pytest.raises(ValueError, match="at least 2 validation images"):
        Validated.from_validation(gaussians, [validation[0], validation[1][:1]])


@pytest.mark.parametrize("learnt", [(1,), (2, 0), (0, 1, 2), (1, 2)])
def test_a_selection_of_tasks_keeps_its_densities_and_calibration(learnt: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    gaussians = Gaussians([Moments.of(rng.normal(size=(50, 4)) + t) for t in range(3)])
    calibration = Validated(torch.tensor([0.0, 10.0, -5.0]), torch.tensor([1.0, 2.0, 3.0]), slope=1.0, bias=0.0)
    router, features = GaussianRouter(gaussians, calibration), torch.from_numpy(rng.normal(size=(20, 4)) + 1)
    whole, selected = router.scores(features, range(3)), router.scores(features, learnt)
    assert torch.equal(selected.log_density, whole.log_density[:, list(learnt)])
    assert torch.equal(selected.weight, whole.weight[:, list(learnt)])
    best = selected.log_density.argmax(1).tolist()
    assert selected.routes("image").task.tolist() == [learnt[i] for i in best]
    assert set(selected.routes("batch").task.tolist()) <= set(learnt)


def test_metrics_of_a_matrix_computed_by_hand() -> None:
    a = np.array([[0.9, 0.4, 0.3], [0.8, 0.7, 0.2], [0.6, 0.5, 0.9]])
    m = Metrics.of(a)
    np.testing.assert_allclose(m.transfer, [math.nan, 0.4, 0.25])
    np.testing.assert_allclose(m.average, [2.3 / 3, 1.6 / 3, 1.4 / 3])
    np.testing.assert_allclose(m.last, [0.6, 0.5, 0.9])
    np.testing.assert_allclose(m.forgetting, [0.3, 0.2, math.nan])
    np.testing.assert_allclose(m.backward_transfer, [-0.3, -0.2, math.nan])
    assert m.mean("transfer") == pytest.approx(0.325)
    assert math.isnan(Metrics.of(np.array([[0.5]])).mean("transfer"))
