"""A run's store in this process, without its actor, for tests of what workers do that need no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from obstore.store import MemoryStore

from diki_ray.learning.module import TaskModule
from diki_ray.store.held_here import HeldHere
from diki_ray.store.objects import BucketObjects, LocalObjects
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore

RUN = "run"


class KilledError(Exception):
    """Stands for the end of a process."""


class FakeStore(HeldHere):
    """A held run in a folder or in memory."""

    kill_after_checkpoint_at: tuple[str, int] | None = None
    """(key, step): the process ends right after this checkpoint is durable, once."""

    def __init__(self, folder: Path | None = None) -> None:
        objects = LocalObjects(str(folder)) if folder else BucketObjects("memory://", MemoryStore())
        self.run = RunStore(objects, RUN)
        self.epoch = self.run.acquire(this_process("test"), 60.0, take_over=True)
        super().__init__(self.run, self.epoch)

    @property
    def blobs(self) -> dict[str, bytes]:
        """Every module by its key."""
        return {entry.key: self.read_module(entry.digest) for entry in self.modules()}

    def save_checkpoint(self, key: str, step: int, blob: bytes, metadata: dict[str, Any] | None = None) -> None:
        super().save_checkpoint(key, step, blob, metadata)
        if (key, step) == self.kill_after_checkpoint_at:
            self.kill_after_checkpoint_at = None
            raise KilledError


def the_module(folder: Path) -> TaskModule:
    """The only module of the run that is stored there."""
    (module,) = the_modules(folder)
    return module


def the_modules(folder: Path) -> list[TaskModule]:
    store = RunStore.open(str(folder), RUN)
    return [TaskModule.from_bytes(store.read_module(entry.digest)) for entry in store.modules()]
