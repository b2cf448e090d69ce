"""Streams learnt and evaluated in this process, without Ray: the trainer's and the evaluator's own code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_store import RUN, FakeStore, KilledError
from tiny_backbone import write_tiny_backbone

from diki_ray.answering.evaluation import Evaluation
from diki_ray.clip.backbone import Backbone
from diki_ray.config import Config, load, parse
from diki_ray.learning.module import TaskModule
from diki_ray.runs.evaluate.cache import NoCache
from diki_ray.runs.evaluate.split import evaluate_here
from diki_ray.runs.plan import Plan, build_method, load_backbone, make_plan
from diki_ray.runs.train.worker import TaskWorker
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore

DEBUG = Path(__file__).parent.parent.parent / "configs" / "debug.yaml"


def planned(prepared: Path, method: dict[str, Any], *overrides: str) -> Plan:
    """The debug stream under another method."""
    tree = load(DEBUG, [f"data.root={prepared}", *overrides]).model_dump()
    config = Config.model_validate(tree | {"method": method})
    return make_plan(config, load_backbone(config))


def tiny_plan(folder: Path, **sections: Any) -> Plan:
    """Forty digits, or what the configuration's `sections` say, on a tiny backbone; every rank may ask for it."""
    if not (folder / "tiny_backbone.py").exists():
        write_tiny_backbone(folder)
    tree = {
        "run": {"name": RUN},
        "tasks": [{"data": "embedded:digits", "shots": 4}],
        "method": {"image_depth": 2, "image_length": 2, "text_depth": 2, "text_length": 2},
        "backbone": {"name": str(folder / "tiny_backbone.py")},
        "data": {"root": str(folder / "prepared")},
    }
    config = parse(tree | sections)
    return make_plan(config, load_backbone(config))


def worker_of(plan: Plan, store: object, backbone: Backbone | None = None) -> TaskWorker:
    """What a worker of a group is, without the group."""
    return TaskWorker(plan.config, build_method(plan.config, backbone or load_backbone(plan.config)), store)  # type: ignore[arg-type]


def learnt(plan: Plan, store: FakeStore | None = None) -> FakeStore:
    store = store or FakeStore()
    worker = worker_of(plan, store)
    for task in plan.tasks:
        worker.learn(task)
    return store


def learnt_through_kills(plan: Plan, *kills: tuple[int, int]) -> FakeStore:
    """The process ends after the checkpoint of each (task, step), and another one goes on."""
    store = FakeStore()
    for task, step in kills:
        store.kill_after_checkpoint_at = (plan.tasks[task].key, step)
        with pytest.raises(KilledError):
            learnt(plan, store)
    return learnt(plan, store)


def store_run(
    storage: str | Path, plan: Plan, blobs: Mapping[str, bytes], run: str | None = None, **metadata: Any
) -> RunStore:
    """The plan's run, or one of another name, as a job leaves it in storage: it has those of the plan's modules that
    `blobs` has by their keys, and its configuration, and nobody holds it."""
    store = RunStore.open(str(storage), run or plan.config.run.name)
    epoch = store.acquire(this_process("test"))
    for task in plan.tasks:
        if task.key in blobs:
            store.commit_module(epoch, task.key, task.name, blobs[task.key], metadata)
    store.put_document(epoch, "config.yaml", plan.config.to_yaml())
    store.release(epoch)
    return store


def modules(plan: Plan, store: FakeStore) -> list[TaskModule]:
    return [TaskModule.from_bytes(store.blobs[task.key]) for task in plan.tasks]


def evaluated(plan: Plan, store: FakeStore) -> Evaluation:
    stream = range(len(plan.tasks))
    return evaluate_here(plan, [t.key for t in plan.tasks], store.module_by_key, [stream], "test", NoCache())
