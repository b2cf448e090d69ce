"""Every method learns and answers on a card as on the CPU: on a real one, and on one that `second_device` acts out on
the CPU, so that a tensor left on the wrong device is found where there is no card.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from every_method import METHODS, plan_in
from fake_store import FakeStore
from learning import evaluated, modules, worker_of
from second_device import DEVICE, second_device

import diki_ray.runs.evaluate.worker as evaluation
from diki_ray.answering import class_model
from diki_ray.learning.module import TaskModule
from diki_ray.runs.plan import Plan, load_backbone

IN_EVERY_RUN = ("classes", "rail", "diki", "zscl_replay")
on_a_card = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NOT MEASURED: torch sees no CUDA card on this machine; run `make gpu` on one"
)


def learnt_and_answered(
    plan: Plan, device: str, dtype: torch.dtype, patch: pytest.MonkeyPatch
) -> tuple[list[TaskModule], np.ndarray]:
    """The modules and the accuracy matrix of a stream on a device, float32 on the CPU's."""
    patch.setattr(evaluation, "device_of", lambda config: device)
    patch.setattr(evaluation, "precision_of", lambda config: dtype)
    patch.setitem(class_model.FACTOR_BYTES_AT_ONCE, DEVICE.type, 2**29)
    store = FakeStore()
    with second_device() if device == DEVICE.type else nullcontext():
        worker = worker_of(plan, store, load_backbone(plan.config).to(device, dtype))
        for task in plan.tasks:
            worker.learn(task)
        return modules(plan, store), evaluated(plan, store).accuracy(range(len(plan.tasks)))


@pytest.mark.parametrize("device", [DEVICE.type, pytest.param("cuda", marks=on_a_card)])
@pytest.mark.parametrize("name", [n if n in IN_EVERY_RUN else pytest.param(n, marks=pytest.mark.long) for n in METHODS])
def test_a_method_learns_and_answers_as_on_the_cpu(
    name: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    plan = plan_in(tmp_path, name)
    expected, accuracy = learnt_and_answered(plan, "cpu", torch.float32, monkeypatch)
    found, its_accuracy = learnt_and_answered(plan, device, torch.float32, monkeypatch)
    for one, other in zip(found, expected, strict=True):
        assert one.parameters.keys() == other.parameters.keys()
        for parameter, value in other.parameters.items():
            np.testing.assert_allclose(one.parameters[parameter], value, atol=1e-2)
    np.testing.assert_allclose(its_accuracy, accuracy, atol=0.05)


@pytest.mark.parametrize("name", METHODS)
@on_a_card
def test_a_method_learns_and_answers_in_bfloat16(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, accuracy = learnt_and_answered(plan_in(tmp_path, name), "cuda", torch.bfloat16, monkeypatch)
    for module in found:
        for value in module.parameters.values():
            assert np.isfinite(value).all()
    assert np.isfinite(accuracy).all()


def test_the_device_that_is_acted_out_refuses_what_a_card_refuses() -> None:
    with second_device():
        here, there = torch.ones(2), torch.ones(2).to(DEVICE)
        assert (there * torch.tensor(2.0) + torch.tensor([1.0, 2.0], device=DEVICE)).cpu().tolist() == [3, 4]
        assert there[torch.tensor([1])].cpu().tolist() == [1]
        for mixed in (lambda: here + there, lambda: torch.ones((), device=DEVICE) * here, lambda: here[there.long()]):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(RuntimeError, match="same device"):
            here[torch.tensor([0, 1])] = there
        with pytest.raises(TypeError, match=r"Tensor\.cpu"):
            there.numpy()
