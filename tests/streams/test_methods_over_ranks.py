"""Two workers learn what one does, whatever a method adds to a step or sums over images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fake_store import RUN, FakeStore, the_modules
from learning import tiny_plan, worker_of
from processes import run_ranks

from diki_ray.runs.plan import Plan
from diki_ray.store.run_store import RunStore

TRAIN = {"epochs": 1, "batch_size": 7, "num_workers": 2, "lr": 0.05}
BLOCK = {"image_depth": 1, "text_depth": 1}
METHODS: dict[str, dict[str, Any]] = {
    "rail": {"hidden_dim": 16},  # sums alone
    "dpw": BLOCK | {"image_length": 2, "text_length": 2, "rank": 2},  # sums over what was trained
    "c_ada": BLOCK | {"rank": 2, "scale": 1.0},  # a penalty, the same everywhere
    "sequential_lora": BLOCK | {"against_forgetting": "ewc"},  # sums, and a penalty from the second task on
    "zscl": BLOCK | {"num_reference": 15, "reference_batch": 5, "average_every": 2},  # a loss of shared rows
}


def plan_in(folder: Path, name: str) -> Plan:
    """zscl distils on a third prepared set."""
    settings = METHODS[name]
    if name == "zscl":
        mist = tiny_plan(folder, method={"name": "zero_shot"}, tasks=[{"data": "embedded:mist", "shots": 2}])
        settings = settings | {"reference": mist.tasks[0].index.uri}
    tasks = [{"data": f"embedded:{task}", "shots": 2} for task in ("digits", "gems")]  # 20 images each
    return tiny_plan(folder, method={"name": name} | settings, tasks=tasks, train=TRAIN)


def learn(plan: Plan, folder: Path, rank: int = 0) -> None:
    store = FakeStore(folder) if rank == 0 else RunStore.open(str(folder), RUN)  # which others only read
    worker = worker_of(plan, store)
    for task in plan.tasks:
        worker.learn(task)


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for name in METHODS:
        dist.init_process_group("gloo", f"file://{folder}/group-{name}", world_size=2, rank=rank)
        learn(plan_in(Path(folder), name), Path(folder) / f"two-{name}", rank)
        dist.destroy_process_group()


def test_two_workers_learn_the_modules_of_one(tmp_path: Path) -> None:
    plans = {name: plan_in(tmp_path, name) for name in METHODS}  # prepares, before two do at once
    run_ranks(one_of_two, str(tmp_path), num_ranks=2)
    for name, plan in plans.items():
        learn(plan, tmp_path / f"one-{name}")
        alone, together = (the_modules(tmp_path / f"{number}-{name}") for number in ("one", "two"))
        assert len(alone) == 2
        for one, two in zip(alone, together, strict=True):
            assert one.key == two.key
            assert set(one.parameters) == set(two.parameters) != set()
            for tensor, expected in one.parameters.items():
                np.testing.assert_allclose(
                    two.parameters[tensor], expected, atol=1e-5, rtol=1e-5, err_msg=f"{name} {tensor}"
                )
