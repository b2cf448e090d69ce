"""Any number of workers learns the same modules to the bit, whatever a method adds to a step or sums over images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_store import RUN, FakeStore
from learning import tiny_plan, worker_of
from processes import run_ranks

from diki_ray.runs.plan import Plan
from diki_ray.store.run_store import RunStore

TASKS = [{"data": f"embedded:{name}", "shots": 2} for name in ("digits", "gems")]
"""20 images each, in batches of 7: the last has 6."""
BLOCK = {"image_depth": 1, "text_depth": 1}
METHODS: dict[str, dict[str, Any]] = {
    "classes": {},  # sums alone
    "rail": {"hidden_dim": 16},
    "diki": BLOCK | {"image_length": 2, "text_length": 2},
    "concat_prompts": BLOCK | {"image_length": 2, "text_length": 2},
    "dpw": BLOCK | {"image_length": 2, "text_length": 2, "rank": 2},  # sums over what was trained
    "c_ada": BLOCK | {"rank": 2, "scale": 1.0},  # a penalty, the same everywhere
    "sequential_lora": BLOCK | {"against_forgetting": "ewc"},  # sums, and a penalty from the second task on
    "badam": BLOCK | {"name": "sequential_lora", "against_forgetting": "badam"},  # draws
    "blip": BLOCK | {"name": "sequential_lora", "against_forgetting": "blip", "blip_prior": 1e-12},  # draws in sums
    "zscl": BLOCK | {"num_reference": 15, "reference_batch": 5, "average_every": 2},  # a loss of shared rows
    "replay": BLOCK | {"name": "sequential_lora", "replay": {"num_images": 15, "batch_size": 4}},  # and of texts
    "zscl_replay": BLOCK | {"name": "zscl", "num_reference": 15, "reference_batch": 5, "replay": {"score": "random"}},
    "keep_lora": BLOCK | {"rank": 2},  # sums before the first step and after the last
    "snd": BLOCK | {"num_reference": 15, "reference_batch": 5},  # a loss of each part's own rows
    "mulki": BLOCK,  # a loss of each image, and sums before the first step
    "mahalanobis": {"rank": 2},  # logits of its own, with gradients that come by no features
}
KINDS = ["classes", "rail", "dpw", "zscl_replay", "mahalanobis"]
"""What `make test` has time for: sums alone, sums over what was trained, a loss of shared rows beside one of the own,
logits of its own."""
MANY_PARTS = {"dpw": 12, "zscl": 7, "snd": 7, "mulki": 12, "replay": 11}
"""More than classes, images of a batch or reference rows: some parts have none of them."""


def plan_in(folder: Path, name: str) -> Plan:
    """zscl and snd distil on a third prepared set."""
    settings = METHODS[name]
    if "num_reference" in settings:
        mist = tiny_plan(folder, method={"name": "zero_shot"}, tasks=[{"data": "embedded:mist", "shots": 2}])
        settings = settings | {"reference": mist.tasks[0].index.uri}
    train = {"epochs": 1, "batch_size": 7, "num_parts": MANY_PARTS.get(name, 3), "lr": 0.05}
    return tiny_plan(folder, method={"name": name} | settings, tasks=TASKS, train=train)


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
