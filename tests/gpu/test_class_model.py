"""The class model on a CUDA card is the class model on the CPU. `make gpu`; says loudly when there is no card."""

from __future__ import annotations

import pytest
import torch

from benchmarks.synthetic import SyntheticMoments, synthetic_classes, synthetic_images
from diki_ray.answering.class_answers import ClassDensities
from diki_ray.answering.class_model import FACTOR_BYTES_AT_ONCE, ClassModel

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NOT MEASURED: torch sees no CUDA card on this machine; run `make gpu` on one"
)


@pytest.mark.parametrize("bounded", [False, True])
def test_densities_weights_and_answers_are_the_cpus(bounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if bounded:
        monkeypatch.setitem(FACTOR_BYTES_AT_ONCE, "cuda", 0)
    source = SyntheticMoments(6, 64)
    tasks = [synthetic_classes(source, task, num_classes=5, shots=16) for task in range(6)]
    model = ClassModel(tasks)
    here = ClassDensities(model, features := synthetic_images(source, 40, 5))
    there = ClassDensities(model.on(torch.device("cuda")), features)
    assert there.pooled.is_cuda
    names = [name for task in tasks for name in task.names]
    zero_shot = torch.randn(40, len(names), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(there.weight(), here.weight())
    torch.testing.assert_close(there.log_density().max(1), here.log_density().max(1))
    answers = [densities.logits(zero_shot, names).softmax(1) for densities in (there, here)]
    torch.testing.assert_close(*answers, atol=1e-6, rtol=1e-4)  # a negligible one may be its bound


def test_a_copy_on_the_card_is_made_once_and_a_grown_model_has_its_own() -> None:
    source, card = SyntheticMoments(3, 64), torch.device("cuda")
    tasks = [synthetic_classes(source, task, num_classes=5, shots=16) for task in range(3)]
    model = ClassModel(tasks[:2])
    assert model.on(card) is model.on(card) is not model
    assert len(model.on(card).columns) == 2
    assert len(model.with_task(tasks[2]).on(card).columns) == 3
