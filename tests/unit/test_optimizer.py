"""The optimiser takes the steps of torch's own classes, to the bit, and does without torch's compiler."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from diki_ray.learning.optimizer import Kind, Optimizer


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((5, 7), (3,))]


@pytest.mark.parametrize(("kind", "weight_decay"), [("sgd", 0.0), ("adamw", 0.1)])
def test_steps_are_torchs_to_the_bit_also_from_a_state(kind: Kind, weight_decay: float) -> None:
    theirs = [tensor.requires_grad_() for tensor in tensors()]
    reference = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind](theirs, lr=1, weight_decay=weight_decay)
    ours = [tensor.requires_grad_() for tensor in tensors()]
    optimizer = Optimizer(ours, kind, weight_decay)
    for number in range(6):
        lr, gradients = 0.1 / (number + 1), [tensor.detach() * (number - 2.5) for tensor in theirs]
        reference.param_groups[0]["lr"] = lr
        for tensor, gradient in zip(theirs, gradients, strict=True):
            tensor.grad = gradient.clone()
        reference.step()
        optimizer.step(gradients, lr)
        assert all(map(torch.equal, ours, theirs))
        resumed = Optimizer(ours, kind, weight_decay)
        resumed.load({n: {m: v.clone() for m, v in moments.items()} for n, moments in optimizer.state.items()})
        optimizer = resumed


def test_the_state_of_something_else_is_refused() -> None:
    optimizer = Optimizer(tensors(), "adamw")
    optimizer.step(tensors(), 0.1)
    for other in (Optimizer(tensors(), "sgd"), Optimizer(tensors()[:1], "adamw"), Optimizer([torch.zeros(2)], "adamw")):
        with pytest.raises(ValueError, match="no state of"):
            other.load(optimizer.state)
    broken = {n: {m: v for m, v in moments.items() if m != "step"} for n, moments in optimizer.state.items()}
    with pytest.raises(ValueError, match="no state of adamw"):
        Optimizer(tensors(), "adamw").load(broken)


def test_a_step_of_training_imports_no_compiler() -> None:
    code = (
        "import sys, torch\nfrom diki_ray.learning.task_trainer import Optimizer\n"
        "for kind in ('sgd', 'adamw'):\n"
        "    Optimizer([torch.zeros(2)], kind).step([torch.ones(2)], 0.1)\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    environment = os.environ | {"DIKI_LIGHT_IMPORT": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=120).returncode == 0
