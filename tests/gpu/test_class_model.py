"""The class model on a card is the class model on the CPU: on a real one, and on one that is acted out. `make gpu`."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from second_device import DEVICE, second_device

from benchmarks.synthetic import SyntheticMoments, synthetic_classes, synthetic_images
from diki_ray.answering.class_answers import ClassDensities
from diki_ray.answering.class_model import FACTOR_BYTES_AT_ONCE, ClassModel

NUM_TASKS, NUM_CLASSES, NUM_IMAGES = 6, 5, 40
SOURCE = SyntheticMoments(NUM_TASKS, 64)
TASKS = [synthetic_classes(SOURCE, task, NUM_CLASSES, shots=16) for task in range(NUM_TASKS)]
cards = pytest.mark.parametrize(
    "card",
    [
        DEVICE,
        pytest.param(
            torch.device("cuda"),
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(),
                reason="NOT MEASURED: torch sees no CUDA card on this machine; run `make gpu` on one",
            ),
        ),
    ],
    ids=str,
)


@cards
@pytest.mark.parametrize("bytes_at_once", [0, 2**29])
def test_densities_weights_and_answers_are_the_cpus(
    card: torch.device, bytes_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FACTOR_BYTES_AT_ONCE, card.type, bytes_at_once)
    model, features = ClassModel(TASKS), synthetic_images(SOURCE, NUM_IMAGES, NUM_CLASSES)
    names = [name for task in TASKS for name in task.names]
    zero_shot = torch.randn(NUM_IMAGES, len(names), generator=torch.Generator().manual_seed(0))
    here = ClassDensities(model, features)
    with second_device() if card == DEVICE else nullcontext():
        there = ClassDensities(model.on(card), features)
        assert there.pooled.device.type == card.type
        weight, density, answers = there.weight(), there.log_density(), there.logits(zero_shot, names).softmax(1)
    torch.testing.assert_close(weight, here.weight())
    torch.testing.assert_close(density.max(1), here.log_density().max(1))
    # A negligible one may be its bound.
    torch.testing.assert_close(answers, here.logits(zero_shot, names).softmax(1), atol=1e-6, rtol=1e-4)


@cards
def test_a_copy_on_the_card_is_made_once_and_a_grown_model_has_its_own(
    card: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FACTOR_BYTES_AT_ONCE, card.type, 0)
    model = ClassModel(TASKS[:2])
    with second_device() if card == DEVICE else nullcontext():
        assert model.on(card) is model.on(card) is not model
        assert len(model.on(card).columns) == 2
        assert len(model.with_task(TASKS[2]).on(card).columns) == 3
