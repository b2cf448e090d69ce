"""The method on a CUDA card: parity in float32, training in bfloat16. `make gpu`; says loudly when there is no card."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import Golden

from diki_ray.learning.task_trainer import Recipe, TaskTrainer

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NOT MEASURED: torch sees no CUDA card on this machine; run `make gpu` on one"
)


def train(golden: Golden, dtype: torch.dtype) -> tuple[list[float], dict[str, np.ndarray]]:
    golden.backbone.to("cuda", dtype)
    batches = golden.train_batches(0)
    steps = golden.meta["epochs"] * len(batches)
    trainer = TaskTrainer(
        golden.method, golden["task0.tokens"], Recipe(lr=golden.meta["lr"]), steps, golden.prompts("init", 0)
    )
    losses = [trainer.step(i.cuda(), y).loss for _ in range(golden.meta["epochs"]) for i, y in batches]
    return losses, {n: p.detach().cpu().numpy() for n, p in trainer.parameters.items()}


def test_float32_on_the_card_is_the_golden_run() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    golden = Golden.load()
    losses, parameters = train(golden, torch.float32)
    np.testing.assert_allclose(losses, golden["task0.train.losses"].numpy(), atol=1e-4)
    for name, expected in golden.prompts("trained", 0).items():
        np.testing.assert_allclose(parameters[name], expected.numpy(), atol=1e-4)


def test_bfloat16_stays_close_and_prompts_stay_float32() -> None:
    golden = Golden.load()
    losses, parameters = train(golden, torch.bfloat16)
    assert all(p.dtype == np.float32 for p in parameters.values())
    np.testing.assert_allclose(losses, golden["task0.train.losses"].numpy(), atol=0.1)
