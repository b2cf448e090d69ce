"""A task begun by two workers, continued by one and finished by three: the undisturbed run's module, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fake_store import RUN, FakeStore, the_module
from learning import tiny_plan, worker_of
from processes import run_ranks

from diki_ray.config import parse
from diki_ray.errors import ConfigError
from diki_ray.runs.plan import Plan, load_backbone, make_plan
from diki_ray.store.run_store import RunStore

TRAIN = {"epochs": 2, "batch_size": 8, "num_workers": 3, "checkpoint_every_steps": 3}
"""40 images: steps 0 to 4 and 5 to 9. The learning rate is the published one."""
STREAM = {"run": {"name": "x"}, "tasks": [{"data": "embedded:digits"}]}
ATTEMPTS = ((2, 4), (1, 8), (3, None))
"""(workers, the step before which all of them stop); each time the steps since the checkpoint three apart are lost."""


class Stopped(Exception):
    """The group is torn down, as when a node of it is lost."""


def learn(plan: Plan, store: object, stop_before: int | None = None) -> None:
    """The plan's one task, from its newest checkpoint on."""
    worker = worker_of(plan, store)
    asked = iter(range(4, 12, 4))  # before steps 4 and 8, which take no checkpoint, every rank asks

    def draining() -> bool:
        if next(asked) == stop_before:
            raise Stopped
        return False

    worker.draining = draining
    worker.learn(plan.tasks[0])


def one_of_three(rank: int, folder: str) -> None:
    """One process takes part in the groups it is needed for: starting it is what costs."""
    torch.set_num_threads(1)
    plan = tiny_plan(Path(folder), train=TRAIN)
    for number, (world_size, stop_before) in enumerate(ATTEMPTS):
        if rank >= world_size:
            continue
        dist.init_process_group("gloo", f"file://{folder}/group{number}", world_size=world_size, rank=rank)
        try:
            learn(plan, FakeStore(Path(folder) / "elastic") if rank == 0 else None, stop_before)
        except Stopped:
            assert stop_before is not None
        dist.destroy_process_group()


def test_fewer_and_then_more_workers_go_on_with_the_same_batches(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, train=TRAIN)
    run_ranks(one_of_three, str(tmp_path), num_ranks=3)
    learn(plan, FakeStore(tmp_path / "undisturbed"))

    elastic, expected = (RunStore.open(str(tmp_path / name), RUN).modules()[0] for name in ("elastic", "undisturbed"))
    assert elastic.metadata["world_sizes"] == [[0, 2], [3, 1], [6, 3]]
    assert expected.metadata["world_sizes"] == [[0, 1]]
    assert elastic.digest == expected.digest
    assert the_module(tmp_path / "elastic").provenance["num_steps"] == 10


def test_more_at_least_than_at_most_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_workers=4 is more than num_workers=3"):
        parse(STREAM | {"train": TRAIN | {"min_workers": 4}})


def test_how_few_workers_are_enough_changes_no_key_and_no_digest(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, train=TRAIN)
    tree = plan.config.model_dump()
    tree["train"] |= {"min_workers": 1, "resize_every_s": 5.0}
    elastic = parse(tree)
    assert make_plan(elastic, load_backbone(elastic)).tasks == plan.tasks
    assert elastic.digest() == plan.config.digest()


def test_how_many_workers_there_are_changes_no_key_where_the_parts_are_said(tmp_path: Path) -> None:
    """And keys from before there were parts are those of as many parts as workers."""
    plan = tiny_plan(tmp_path, train=TRAIN)
    tree = plan.config.model_dump()
    for workers in (1, 2, 3):
        tree["train"] |= {"num_parts": 3, "num_workers": workers}
        other = parse(tree)
        assert make_plan(other, load_backbone(other)).tasks == plan.tasks  # of 3 workers, with nothing said
        assert other.digest() == plan.config.digest()
    tree["train"]["num_parts"] = 2
    assert parse(tree).digest() != plan.config.digest()


def test_workers_above_the_parts_are_not_started() -> None:
    train = TRAIN | {"num_parts": 2, "num_workers": 5}
    assert parse(STREAM | {"train": train}).train.most_workers == 2
