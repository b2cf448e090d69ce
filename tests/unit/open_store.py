"""A run's store without its actor, for tests of what workers do that need no Ray."""

from __future__ import annotations

from pathlib import Path

from diki_ray.learning.module import TaskModule
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore

RUN = "run"


class OpenStore:
    """What TaskWorker asks of a StoreClient."""

    def __init__(self, folder: Path):
        self.run = RunStore.open(str(folder), RUN)
        self.epoch = self.run.acquire(this_process("test"), 60.0, take_over=True)
        self.modules, self.load_checkpoint = self.run.modules, self.run.load_checkpoint
        self.read_module, self.module_by_key = self.run.read_module, self.run.module_by_key

    def save_checkpoint(self, *args: object) -> None:
        self.run.save_checkpoint(self.epoch, *args)  # type: ignore[arg-type]

    def drop_checkpoints(self, key: str) -> None:
        self.run.drop_checkpoints(self.epoch, key)

    def commit_module(self, *args: object) -> None:
        self.run.commit_module(self.epoch, *args)  # type: ignore[arg-type]

    def record_progress(self, event: dict) -> None:
        pass


def the_module(folder: Path) -> TaskModule:
    """The only module of the run that is stored there."""
    (module,) = the_modules(folder)
    return module


def the_modules(folder: Path) -> list[TaskModule]:
    store = RunStore.open(str(folder), RUN)
    return [TaskModule.from_bytes(store.read_module(entry.digest)) for entry in store.modules()]
