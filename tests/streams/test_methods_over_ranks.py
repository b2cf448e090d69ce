"""Any number of workers learns the same modules to the bit, whatever a method adds to a step or sums over images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from every_method import METHODS, plan_in
from fake_store import RUN, FakeStore
from learning import worker_of
from processes import run_ranks

from diki_ray.runs.plan import Plan
from diki_ray.store.run_store import RunStore

KINDS = ["classes", "rail", "dpw", "zscl_replay", "mahalanobis"]
"""What `make test` has time for: sums alone, sums over what was trained, a loss of shared rows beside one of the own,
logits of its own."""


def learn(plan: Plan, folder: Path, rank: int = 0) -> None:
    store = FakeStore(folder) if rank == 0 else RunStore.open(str(folder), RUN)  # which others only read
    worker = worker_of(plan, store)
    for task in plan.tasks:
        worker.learn(task)


def one_of_many(rank: int, folder: str, number: int, names: Sequence[str]) -> None:
    """One process learns with every method: starting it is what costs."""
    torch.set_num_threads(1)
    for name in names:
        plan = plan_in(Path(folder), name)
        dist.init_process_group("gloo", f"file://{folder}/group-{name}", world_size=number, rank=rank)
        learn(plan, Path(folder) / f"{name}-{number}", rank)
        dist.destroy_process_group()


def learnt_alike_by_one_and_by(number: int, names: Sequence[str], tmp_path: Path) -> None:
    plans = {name: plan_in(tmp_path, name) for name in names}  # prepares, before two do at once
    run_ranks(one_of_many, str(tmp_path), number, names, num_ranks=number)
    for name, plan in plans.items():
        learn(plan, tmp_path / f"{name}-1")
        expected = digests(tmp_path / f"{name}-1")
        assert len(set(expected)) == 2
        assert digests(tmp_path / f"{name}-{number}") == expected, name


def digests(folder: Path) -> list[str]:
    return [entry.digest for entry in RunStore.open(str(folder), RUN).modules()]


def test_two_workers_learn_the_modules_of_one_to_the_bit(tmp_path: Path) -> None:
    learnt_alike_by_one_and_by(2, KINDS, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [2, 3])
def test_any_number_of_workers_learns_the_modules_of_one_to_the_bit_with_every_method(
    tmp_path: Path, number: int
) -> None:
    learnt_alike_by_one_and_by(number, list(METHODS), tmp_path)
