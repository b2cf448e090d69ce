"""Streams learnt and evaluated in this process, without Ray: the trainer's and the evaluator's own code, and a store
that is a dictionary."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diki_ray.answering.evaluation import Evaluation
from diki_ray.config import Config, load
from diki_ray.learning.module import TaskModule
from diki_ray.runs.evaluate.cache import NoCache
from diki_ray.runs.evaluate.split import evaluate_here
from diki_ray.runs.plan import Plan, build_method, load_backbone, make_plan
from diki_ray.runs.train.worker import TaskWorker

DEBUG = Path(__file__).parent.parent.parent / "configs" / "debug.yaml"


class KilledError(Exception):
    """Stands for the end of a process."""


@dataclass
class MemoryStore:
    """What the trainer asks of a store."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    checkpoints: dict[str, tuple[int, bytes, dict[str, Any]]] = field(default_factory=dict)
    kill_after_checkpoint_at: tuple[str, int] | None = None
    """(key, step): the process ends right after this checkpoint is durable."""

    def modules(self) -> list[Any]:
        return [SimpleNamespace(key=key) for key in self.blobs]

    def module_by_key(self, key: str) -> bytes:
        return self.blobs[key]

    def commit_module(self, key: str, task: str, blob: bytes, metadata: dict[str, Any]) -> None:
        self.blobs[key] = blob

    def load_checkpoint(self, key: str) -> tuple[int, bytes, dict[str, Any]] | None:
        return self.checkpoints.get(key)

    def save_checkpoint(self, key: str, step: int, blob: bytes) -> None:
        self.checkpoints[key] = (step, blob, {})
        if (key, step) == self.kill_after_checkpoint_at:
            self.kill_after_checkpoint_at = None
            raise KilledError

    def drop_checkpoints(self, key: str) -> None:
        self.checkpoints.pop(key, None)

    def record_progress(self, event: dict[str, Any]) -> None:
        pass


def planned(prepared: Path, method: dict[str, Any], *overrides: str) -> Plan:
    """The debug stream under another method."""
    tree = load(DEBUG, [f"data.root={prepared}", *overrides]).model_dump()
    config = Config.model_validate(tree | {"method": method})
    return make_plan(config, load_backbone(config))


def learnt(plan: Plan, store: MemoryStore | None = None) -> MemoryStore:
    store = store or MemoryStore()
    backbone = load_backbone(plan.config)
    worker = TaskWorker(plan.config, build_method(plan.config, backbone), store)  # type: ignore[arg-type]
    for task in plan.tasks:
        worker.learn(task)
    return store


def learnt_through_kills(plan: Plan, *kills: tuple[int, int]) -> MemoryStore:
    """The process ends after the checkpoint of each (task, step), and another one goes on."""
    store = MemoryStore()
    for task, step in kills:
        store.kill_after_checkpoint_at = (plan.tasks[task].key, step)
        with pytest.raises(KilledError):
            learnt(plan, store)
    return learnt(plan, store)


def modules(plan: Plan, store: MemoryStore) -> list[TaskModule]:
    return [TaskModule.from_bytes(store.blobs[task.key]) for task in plan.tasks]


def evaluated(plan: Plan, store: MemoryStore) -> Evaluation:
    stream = range(len(plan.tasks))
    return evaluate_here(plan, [t.key for t in plan.tasks], store.module_by_key, [stream], "test", NoCache())
