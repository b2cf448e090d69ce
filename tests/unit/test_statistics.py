"""The sums that a task's images leave behind: exact, whoever added them up in whichever order."""

import tracemalloc

import numpy as np
import pytest

from diki_ray.errors import CorruptError, DataError
from diki_ray.learning.moments import Moments
from diki_ray.learning.statistics import MOST_DIMENSIONS, Statistics

RNG = np.random.default_rng(0)


def sample(n: int = 500, e: int = 24, c: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    features = rng.normal(size=(n, e)) * 0.1 + np.eye(e)[labels] + 1
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32), labels


def same(a: Statistics, b: Statistics) -> bool:
    return all(np.array_equal(vars(a)[n], vars(b)[n]) for n in ("counts", "first", "second"))


def test_they_are_the_moments_of_the_features_and_of_each_class() -> None:
    x, y = sample()
    statistics = Statistics.of(x, y, 6)
    direct = Moments.of(x)
    assert statistics.count == direct.count
    np.testing.assert_allclose(statistics.moments.mean, direct.mean, atol=1e-7)
    np.testing.assert_allclose(statistics.moments.scatter, direct.scatter, atol=1e-5)
    within = np.zeros((24, 24))
    for c in range(5):
        own = x[y == c].astype(np.float64)
        np.testing.assert_allclose(statistics.means[c], own.mean(0), atol=1e-6)
        within += (own - own.mean(0)).T @ (own - own.mean(0))
    np.testing.assert_allclose(statistics.scatter_within, within, atol=1e-5)
    assert statistics.counts[5] == 0
    assert not statistics.means[5].any()


def test_any_order_and_any_grouping_gives_the_same_bits() -> None:
    x, y = sample(10_000)
    whole = Statistics.of(x, y, 5)
    order = RNG.permutation(len(x))
    for cuts in ([1], [3, 7000], [100, 101, 9999]):
        parts = [Statistics.of(x[order][rows], y[order][rows], 5) for rows in np.split(np.arange(len(x)), cuts)]
        assert same(whole, Statistics.merged(parts))
        assert same(whole, Statistics.merged(parts[::-1]))


def test_what_is_taken_back_was_never_there() -> None:
    x, y = sample()
    assert same(Statistics.of(x, y, 5).minus(Statistics.of(x[:7], y[:7], 5)), Statistics.of(x[7:], y[7:], 5))
    with pytest.raises(DataError, match="not all among those"):
        Statistics.of(x[:7], y[:7], 5).minus(Statistics.of(x, y, 5))


def test_a_class_more_is_room_for_it() -> None:
    x, y = sample(c=3)
    assert same(Statistics.of(x, y, 3).among("abc", "abcde"), Statistics.of(x, y, 5))


def test_they_are_stored_in_as_few_bytes_as_hold_them_and_come_back_equal() -> None:
    x, y = sample(1600, 512, 100)
    statistics = Statistics.of(x, y, 100)
    tensors = statistics.tensors()
    assert same(statistics, Statistics.from_tensors(tensors))
    assert sum(t.nbytes for t in tensors.values()) < 1_050_000  # 1.46 MB in 64 bits
    empty = Statistics.empty(2, 3)
    assert same(empty, Statistics.from_tensors(empty.tensors()))


@pytest.mark.parametrize("value", [0, 1, -1, 127, 128, -128, -129, 2**31, -(2**40), 2**62])
def test_every_integer_survives_its_bytes(value: int) -> None:
    statistics = Statistics(np.zeros(1, np.int64), np.full((1, 1), value), np.full((1, 1), value))
    assert same(statistics, Statistics.from_tensors(statistics.tensors()))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0])
def test_features_that_are_none_are_refused_with_a_sentence(bad: float) -> None:
    x, y = sample(4)
    x[1, 2] = bad
    with pytest.raises(DataError, match="not finite numbers of norm 1"):
        Statistics.of(x, y, 5)


def test_statistics_of_other_classes_or_backbones_do_not_add_up() -> None:
    with pytest.raises(DataError, match="different tasks or backbones"):
        Statistics.empty(2, 3).merge(Statistics.empty(2, 4))


def test_sums_that_would_leave_their_range_are_refused() -> None:
    big = Statistics(np.ones(1, np.int64), np.zeros((1, 1), np.int64), np.full((1, 1), 2**61))
    with pytest.raises(DataError, match="divide it"):
        big.merge(big)


@pytest.mark.parametrize("dimensions", [50_000, MOST_DIMENSIONS + 1])
def test_dimensions_that_a_file_only_claims_take_no_memory(dimensions: int) -> None:
    """With squares that fit them and with ones that do not: 60 KB asked for 20 GB, which a machine may even have."""
    fitting = dimensions * (dimensions + 1) // 2 if dimensions == MOST_DIMENSIONS + 1 else 3
    claimed = {
        "counts": np.ones(1, np.int64),
        "first": np.zeros((1, 1, dimensions), np.uint8),
        "second": np.zeros((1, fitting), np.uint8),
    }
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError, match="do not fit"):
            Statistics.from_tensors(claimed)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_features_of_more_dimensions_than_can_be_read_again_are_not_added_up() -> None:
    with pytest.raises(DataError, match="8,193 dimensions"):
        Statistics.of(np.zeros((1, MOST_DIMENSIONS + 1)), np.zeros(1, np.int64), 1)


def test_other_arrays_are_no_statistics() -> None:
    good = Statistics.of(*sample(), 5).tensors()
    for name in good:
        with pytest.raises(CorruptError):
            Statistics.from_tensors({n: v for n, v in good.items() if n != name})
    for changed in ({"counts": -good["counts"]}, {"counts": good["counts"][1:]}, {"second": good["second"][:, 1:]}):
        with pytest.raises(CorruptError):
            Statistics.from_tensors(good | changed)
