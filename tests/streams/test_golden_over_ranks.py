"""The golden task trained by any number of workers: equal to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from golden import Golden, golden_trainer
from processes import run_ranks

from diki_ray.learning.collective import own_parts
from diki_ray.learning.task_trainer import TaskTrainer

NUM_PARTS = 6
"""For 5 classes and batches of 16: a part has no class, and parts are uneven."""
WORLD_SIZES = (2, 3, 4, 6)


def train_golden_with_each_number_of_workers(rank: int, folder: str) -> None:
    """One process takes part in the groups it is needed for, one after the other: starting it is what costs."""
    torch.set_num_threads(1)
    golden = Golden.load()
    for world_size in WORLD_SIZES:
        if rank < world_size:
            train_golden(golden, rank, world_size, folder)


def train_golden(golden: Golden, rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/group{world_size}", world_size=world_size, rank=rank)
    run = golden_run(golden, golden_trainer(golden, num_parts=NUM_PARTS))
    if rank == 0:
        torch.save(run, f"{folder}/{world_size}.pt")
    dist.destroy_process_group()


def golden_run(golden: Golden, trainer: TaskTrainer) -> dict[str, Any]:
    """Losses and parameters of all steps; image n of a batch is in part n modulo the number of parts."""
    parts, losses = trainer.num_parts, []
    for _ in range(golden.meta["epochs"]):
        for images, labels in golden.train_batches(0):
            batch = [(images[part::parts], labels[part::parts]) for part in own_parts(parts)]
            losses.append(trainer.step_in_parts(batch).loss)
    return {"losses": losses, "parameters": {n: p.detach() for n, p in trainer.parameters.items()}}


def test_the_trained_module_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    """1, 2, 3, 4 and 6 workers over the golden steps in 6 parts: equal to the bit, and to 1e-5 of one part."""
    golden = Golden.load()
    run_ranks(train_golden_with_each_number_of_workers, str(tmp_path), num_ranks=max(WORLD_SIZES))
    alone = golden_run(golden, golden_trainer(golden, num_parts=NUM_PARTS))
    whole = golden_run(golden, golden_trainer(golden))
    np.testing.assert_allclose(alone["losses"], whole["losses"], atol=1e-5)
    for name, expected in whole["parameters"].items():
        torch.testing.assert_close(alone["parameters"][name], expected, atol=1e-5, rtol=0)
    for world_size in WORLD_SIZES:
        run = torch.load(tmp_path / f"{world_size}.pt", weights_only=True)
        assert run["losses"] == alone["losses"]
        for name, expected in alone["parameters"].items():
            assert torch.equal(run["parameters"][name], expected), f"{name} with {world_size} workers"
