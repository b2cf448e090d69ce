"""Routing among many tasks: ruling out by a bound changes no answer, and computes few densities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.synthetic import SyntheticMoments, synthetic_features
from diki_ray.answering.coarse import CoarseGaussians
from diki_ray.answering.gaussians import Gaussians
from diki_ray.learning.moments import Moments, Shrinkage


def exact_where_it_counts(gaussians: Gaussians, coarse: CoarseGaussians, features: torch.Tensor) -> torch.Tensor:
    """Asserts that best tasks and densities are those of computing all; which pairs were computed, bool [N, T]."""
    exact, routed = gaussians.log_density(features), coarse.log_density(features)
    computed = routed > -torch.inf
    assert torch.equal(routed.argmax(1), exact.argmax(1))
    torch.testing.assert_close(routed.max(1).values, exact.max(1).values, rtol=1e-9, atol=0)
    torch.testing.assert_close(routed[computed], exact[computed], rtol=1e-9, atol=0)
    return computed


@pytest.mark.parametrize("embed_dim", [32, 51, 200])
def test_the_best_of_many_tasks_is_that_of_computing_all(embed_dim: int) -> None:
    gaussians = Gaussians(SyntheticMoments(100, embed_dim))
    features = synthetic_features(gaussians, 300)
    computed = exact_where_it_counts(gaussians, CoarseGaussians(gaussians), features)
    assert computed.double().mean() < 0.25


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    count=st.sampled_from([3, 8, 60]),
    rank=st.integers(1, 12),
    shrinkage=st.sampled_from(["none", "oas"]),
)
def test_whatever_the_tasks_and_the_directions_the_answer_is_exact(
    seed: int, count: int, rank: int, shrinkage: Shrinkage
) -> None:
    """Also where covariances are singular but for ε, and where tasks are so alike that nothing can be ruled out."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(9, 12)) * rng.choice([0.01, 1.0])
    samples = [mean + rng.normal(size=(count, 12)) * rng.choice([0.1, 1.0]) for mean in means]
    gaussians = Gaussians([Moments.of(x) for x in samples], shrinkage=shrinkage)
    features = torch.from_numpy(np.concatenate([*samples, rng.normal(size=(20, 12))]))
    exact_where_it_counts(gaussians, CoarseGaussians(gaussians, rank=rank), features)


def test_the_bound_is_nowhere_below_the_density_and_tight_with_all_directions() -> None:
    gaussians = Gaussians(SyntheticMoments(10, 24))
    features = synthetic_features(gaussians, 100)
    exact = gaussians.log_density(features)
    for rank in (1, 4, 12):
        assert (CoarseGaussians(gaussians, rank).upper_bound(features) >= exact - 1e-6 * exact.abs()).all()
    torch.testing.assert_close(CoarseGaussians(gaussians, 24).upper_bound(features), exact, rtol=1e-6, atol=1e-6)


def test_of_two_equal_tasks_the_first_answers() -> None:
    moments = SyntheticMoments(1, 8)[0]
    gaussians = Gaussians([moments, moments])
    assert CoarseGaussians(gaussians).log_density(synthetic_features(gaussians, 50)).argmax(1).tolist() == [0] * 50


def test_no_features_give_no_densities() -> None:
    gaussians = Gaussians(SyntheticMoments(3, 8))
    assert CoarseGaussians(gaussians).log_density(torch.zeros(0, 8)).shape == (0, 3)
