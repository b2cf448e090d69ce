"""Batches on their way to the device."""

from __future__ import annotations

import pytest
import torch

from diki_ray.data.stream import Batch
from diki_ray.data.to_device import on_device


def batches(n: int) -> list[Batch]:
    return [
        Batch(0, step, torch.full((2, 3, 4, 4), step), torch.tensor([step, step]), ("a", "b"), (0, 1), 2)
        for step in range(n)
    ]


def test_on_the_cpu_the_very_same_batches_pass_through() -> None:
    given = batches(3)
    assert all(a is b for a, b in zip(on_device(given, "cpu"), given, strict=True))


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NOT MEASURED: torch sees no CUDA card; run `make gpu` on one"
)
def test_on_a_card_each_batch_arrives_in_order_and_whole() -> None:
    given = batches(5)
    for a, b in zip(on_device(given, "cuda"), given, strict=True):
        assert a.images.is_cuda
        assert torch.equal(a.images.cpu(), b.images)
        assert (a.step, a.keys) == (b.step, b.keys)
    assert list(on_device([], "cuda")) == []
