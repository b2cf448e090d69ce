"""Modules of a former version get their class means from their training images, to the byte what training leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from learning import learnt, store_run, tiny_plan

from diki_ray.errors import ConfigError
from diki_ray.learning.module import TaskModule
from diki_ray.runs.fill import fill_class_means
from diki_ray.store.process import this_process


def test_filled_in_modules_are_those_that_training_leaves(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, train={"epochs": 1, "num_workers": 1})
    trained = TaskModule.from_bytes(learnt(plan).module_by_key(plan.tasks[0].key))
    former = replace(trained, statistics=None)
    store = store_run(tmp_path / "storage", plan, {former.key: former.to_bytes()}, cost=1)
    epoch = store.acquire(this_process("test"))
    said: list[str] = []
    assert fill_class_means(store, epoch, plan.config, said.append) == said == [former.task]
    [entry] = store.modules()
    assert store.read_module(entry.digest) == trained.to_bytes()
    assert (entry.key, entry.metadata) == (former.key, {"cost": 1})
    assert store.find_in_library(former.key) == entry.digest  # other runs adopt the later format, too
    assert fill_class_means(store, epoch, plan.config) == []
    assert store.verify() == ()


def test_other_data_fill_nothing_in(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, train={"epochs": 1, "num_workers": 1})
    trained = TaskModule.from_bytes(learnt(plan).module_by_key(plan.tasks[0].key))
    other = replace(trained, statistics=None, provenance=trained.provenance | {"data": {"digest": "of another set"}})
    store = store_run(tmp_path / "storage", plan, {other.key: other.to_bytes()})
    with pytest.raises(ConfigError, match="not those that its module was learnt from"):
        fill_class_means(store, store.acquire(this_process("test")), plan.config)
    assert TaskModule.from_bytes(store.read_module(store.modules()[0].digest)).statistics is None
