"""Moments merge exactly, shrinkage is scikit-learn's, densities are SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.covariance import OAS, LedoitWolf

from diki_ray.answering.gaussians import Gaussians
from diki_ray.learning.moments import Moments


def unit_features(n: int, e: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, e)) + np.linspace(0, 2, e)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 50), max_size=5), seed=st.integers(0, 1000))
def test_moments_merge_whatever_the_parts(cuts: list[int], seed: int) -> None:
    x = unit_features(50, 6, seed)
    parts = [Moments.of(part) for part in np.split(x, sorted(cuts))]
    merged, whole = Moments.merged(parts), Moments.of(x)
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean, atol=1e-14)
    np.testing.assert_allclose(merged.scatter, whole.scatter, atol=1e-13)
    np.testing.assert_allclose(merged.covariance(eps=0), np.cov(x.T), atol=1e-14)


@pytest.mark.parametrize(("shrinkage", "estimator"), [("oas", OAS), ("ledoit_wolf", LedoitWolf)])
@pytest.mark.parametrize(("n", "e"), [(20, 8), (200, 8), (6, 16)])
def test_shrinkage_from_moments_alone_is_scikit_learns(shrinkage, estimator, n: int, e: int) -> None:
    x = unit_features(n, e, seed=n)
    expected = estimator().fit(x).covariance_
    np.testing.assert_allclose(Moments.of(x).covariance(0.0, shrinkage), expected, atol=1e-12)


def test_log_densities_are_scipys() -> None:
    samples = [unit_features(100, 8, seed) for seed in (1, 2, 3)]
    moments = [Moments.of(x) for x in samples]
    queries = torch.from_numpy(unit_features(10, 8, 9))
    actual = Gaussians(moments, eps=1e-5).log_density(queries)
    for t, m in enumerate(moments):
        expected = multivariate_normal(m.mean, m.covariance(1e-5)).logpdf(queries.numpy())
        np.testing.assert_allclose(actual[:, t].numpy(), expected, rtol=1e-9)


def test_fewer_images_than_dimensions_stay_finite_and_prefer_their_own() -> None:
    """The covariance is singular but for ε = 1e-7; in float64 the factorisation and the ranking hold."""
    few = [unit_features(12, 64, seed) for seed in (1, 2)]
    gaussians = Gaussians([Moments.of(x) for x in few])
    for t, x in enumerate(few):
        densities = gaussians.log_density(torch.from_numpy(x))
        assert torch.isfinite(densities).all()
        assert (densities.argmax(1) == t).all()


def test_packed_scatter_comes_back_bit_for_bit() -> None:
    m = Moments.of(unit_features(30, 7, 0))
    back = Moments.unpacked(m.count, m.mean, m.packed())
    assert np.array_equal(np.tril(back.scatter), np.tril(m.scatter))
    assert np.array_equal(back.scatter, back.scatter.T)
    assert m.packed().nbytes == 7 * 8 // 2 * 8


def test_a_covariance_needs_two_features() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Moments.of(np.ones((1, 3))).covariance()
