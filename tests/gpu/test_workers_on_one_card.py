"""Data-parallel training with the classes split among workers, on one card: NCCL with one rank, gloo with two.

The same body runs on the CPU with gloo, so that it is known to be right where there is no card. Several cards, and
their speed, are not measured here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from golden import Golden, golden_trainer
from processes import run_ranks

from diki_ray.learning.collective import gather_rows, own_parts, share, sum_of_parts

on_a_card = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NOT MEASURED: torch sees no CUDA card on this machine; run `make gpu` on one"
)


def collectives_are_exact(device: str) -> None:
    """As they are called with several ranks; `learning/collective.py` leaves them out with one."""
    world_size, rows = dist.get_world_size(), torch.arange(15.0, device=device).reshape(5, 3)
    total = torch.full((7,), 1.5, device=device)
    dist.all_reduce(total)
    assert total.tolist() == [1.5 * world_size] * 7
    for num_parts in (2, 3, 7):  # of seven some are empty
        own = own_parts(num_parts)
        assert torch.equal(gather_rows([rows[share(5, part, num_parts)] for part in own], 5, num_parts), rows)
        ones = [torch.full((2,), float(part), device=device) for part in own]
        assert sum_of_parts(ones, num_parts).tolist() == [sum(range(num_parts))] * 2


def train_as_one_of(rank: int, world_size: int, backend: str, device: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group(backend, f"file://{folder}/group", world_size=world_size, rank=rank)
    collectives_are_exact(device)
    golden = Golden.load()
    golden.backbone.to(device)
    trainer = golden_trainer(golden)
    losses = [
        trainer.step(images[rank::world_size].to(device), labels[rank::world_size]).loss
        for _ in range(golden.meta["epochs"])
        for images, labels in golden.train_batches(0)
    ]
    if rank == 0:
        parameters = {n: p.detach().cpu() for n, p in trainer.parameters.items()}
        torch.save({"losses": losses, "parameters": parameters}, f"{folder}/trained.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("backend", "world_size", "device", "tolerance"),
    [
        ("gloo", 2, "cpu", 1e-5),
        pytest.param("nccl", 1, "cuda", 1e-4, marks=on_a_card),
        pytest.param("gloo", 2, "cuda", 1e-4, marks=on_a_card),
    ],
)
def test_the_trained_module_is_that_of_one_process_on_the_cpu(
    backend: str, world_size: int, device: str, tolerance: float, tmp_path: Path
) -> None:
    run_ranks(train_as_one_of, world_size, backend, device, str(tmp_path), num_ranks=world_size)
    run = torch.load(tmp_path / "trained.pt", weights_only=True)
    golden = Golden.load()
    alone = golden_trainer(golden)
    losses = [alone.step(*batch).loss for _ in range(golden.meta["epochs"]) for batch in golden.train_batches(0)]
    np.testing.assert_allclose(run["losses"], losses, atol=tolerance)
    for name, expected in alone.parameters.items():
        torch.testing.assert_close(run["parameters"][name], expected.detach(), atol=tolerance, rtol=0)
