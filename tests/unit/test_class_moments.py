"""Class moments add and subtract exactly, whatever the order; the scatter within classes follows from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diki_ray.errors import DataError
from diki_ray.learning.class_moments import ClassMoments
from diki_ray.learning.moments import Moments


def sample(n: int, e: int, c: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-norm float32 features around one mean a class, and labels."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(c, (n,), generator=generator)
    x = torch.randn(c, e, generator=generator)[y] + torch.randn(n, e, generator=generator)
    return torch.nn.functional.normalize(x, dim=1), y


def same(a: ClassMoments, b: ClassMoments) -> bool:
    return a.counts.tobytes() == b.counts.tobytes() and a.sums.tobytes() == b.sums.tobytes()


def test_counts_and_means_are_those_of_the_images() -> None:
    x, y = sample(60, 6, 4)
    moments = ClassMoments.of(x, y, 4)
    for c in range(4):
        assert moments.counts[c] == (y == c).sum()
        np.testing.assert_allclose(moments.means[c], x[y == c].double().mean(0), atol=2**-30)


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 80), max_size=6), seed=st.integers(0, 1000))
def test_any_parts_in_any_order_give_the_same_bits(cuts: list[int], seed: int) -> None:
    x, y = sample(80, 5, 3, seed)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(seed))
    parts = [ClassMoments.of(x[part], y[part], 3) for part in np.split(order.numpy(), sorted(cuts))]
    assert same(ClassMoments.merged(parts), ClassMoments.of(x, y, 3))


def test_images_taken_back_leave_the_bits_of_never_having_been_added() -> None:
    x, y = sample(50, 7, 3)
    without = ClassMoments.of(x, y, 3).minus(ClassMoments.of(x[40:], y[40:], 3))
    assert same(without, ClassMoments.of(x[:40], y[:40], 3))


def test_more_images_than_there_are_cannot_be_taken_back() -> None:
    x, y = sample(5, 4, 1)
    with pytest.raises(DataError, match="5 images of class 0 cannot be taken back: the task has 3 of it"):
        ClassMoments.of(x[:3], y[:3], 1).minus(ClassMoments.of(x, y, 1))


def test_within_scatter_is_the_sum_over_classes() -> None:
    x, y = sample(70, 6, 5)
    expected = sum(Moments.of(x[y == c]).scatter for c in range(5))
    np.testing.assert_allclose(ClassMoments.of(x, y, 5).within_scatter(Moments.of(x)), expected, atol=1e-7)


def test_a_class_without_images_has_no_part_in_it() -> None:
    x, y = sample(30, 6, 3)
    few, more = ClassMoments.of(x, y, 3), ClassMoments.of(x, y, 9)
    assert more.seen.tolist() == few.seen.tolist() == [0, 1, 2]
    assert np.array_equal(more.within_scatter(Moments.of(x)), few.within_scatter(Moments.of(x)))


def test_one_image_a_class_has_no_scatter_within() -> None:
    x, y = sample(8, 6, 3)[0], torch.arange(8)
    np.testing.assert_allclose(ClassMoments.of(x, y, 8).within_scatter(Moments.of(x)), 0, atol=1e-8)


def test_no_images_are_no_counts() -> None:
    nothing = ClassMoments.of(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 2)
    assert same(nothing, ClassMoments.empty(2, 4))


def test_features_that_are_not_finite_are_named() -> None:
    x, y = sample(10, 4, 2)
    x[7, 1] = torch.nan
    with pytest.raises(DataError, match="1 of 10 image features are not finite numbers, the first is number 7"):
        ClassMoments.of(x, y, 2)


@pytest.mark.parametrize("wrong", [-1, 2])
def test_labels_out_of_range_are_named(wrong: int) -> None:
    x, y = sample(10, 4, 2)
    y[0] = wrong
    with pytest.raises(DataError, match="but the task has 2 classes"):
        ClassMoments.of(x, y, 2)


def test_moments_of_other_images_are_refused() -> None:
    x, y = sample(10, 4, 2)
    with pytest.raises(DataError, match="class moments are of 10 images and the moments of 9"):
        ClassMoments.of(x, y, 2).within_scatter(Moments.of(x[:9]))
