"""A run that this process holds and writes itself, without an actor: for a driver that does all the work in its own
process, such as a notebook. The lease is the one that any driver takes, so of two writers one is refused.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from diki_ray.errors import FencedError, StorageError
from diki_ray.store.interface import HeldRun, RunStatus
from diki_ray.store.log import Entry
from diki_ray.store.process import this_process
from diki_ray.store.run_store import DEFAULT_TTL_S, RunStore


class HeldHere(HeldRun):
    """A held run whose calls go straight to its storage. One thread may use it, but for `progress`."""

    def __init__(self, store: RunStore, epoch: int) -> None:
        self._store, self._epoch = store, epoch
        self._events: list[dict[str, Any]] = []

    @property
    def storage(self) -> str:
        return self._store.objects.uri

    @property
    def last_durable_write(self) -> float:
        lease = self._store.state.lease
        return 0.0 if lease is None else lease.time

    def modules(self) -> tuple[Entry, ...]:
        return self._store.modules()

    def has_module(self, key: str) -> bool:
        return self._store.has_module(key)

    def read_module(self, digest: str) -> bytes:
        return self._store.read_module(digest)

    def module_by_key(self, key: str) -> bytes:
        return self._store.module_by_key(key)

    def find_in_library(self, key: str) -> str | None:
        return self._store.find_in_library(key)

    def damaged_modules(self) -> tuple[Entry, ...]:
        return self._store.damaged_modules()

    def load_checkpoint(self, key: str) -> tuple[int, bytes, dict[str, Any]] | None:
        return self._store.load_checkpoint(key)

    def get_document(self, name: str) -> Any:
        return self._store.get_document(name)

    def commit_module(self, key: str, task: str, blob: bytes, metadata: dict[str, Any] | None = None) -> Entry:
        return self._store.commit_module(self._epoch, key, task, blob, metadata)

    def adopt_module(self, key: str, task: str) -> Entry | None:
        return self._store.adopt_module(self._epoch, key, task)

    def remove_task(self, task: str) -> Entry:
        """Take a task out of the run; see RunStore.remove_task."""
        return self._store.remove_task(self._epoch, task)

    def save_checkpoint(self, key: str, step: int, blob: bytes, metadata: dict[str, Any] | None = None) -> None:
        self._store.save_checkpoint(self._epoch, key, step, blob, metadata)

    def drop_checkpoints(self, key: str) -> None:
        self._store.drop_checkpoints(self._epoch, key)

    def put_document(self, name: str, document: dict[str, Any] | list[Any] | str) -> None:
        self._store.put_document(self._epoch, name, document)

    def record_progress(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def progress(self, since: int = 0) -> tuple[int, list[dict[str, Any]]]:
        events = self._events[since:]
        return since + len(events), events

    def status(self) -> RunStatus:
        return status_of(self._store, self._epoch, os.getpid())


def status_of(store: RunStore, epoch: int, driver_pid: int) -> RunStatus:
    """Return the numbers of a run that this process writes for the driver `driver_pid`."""
    return {
        "pid": os.getpid(),
        "driver_pid": driver_pid,
        "epoch": epoch,
        "version": store.version,
        "num_modules": len(store.modules()),
        "num_bytes": sum(entry.num_bytes for entry in store.modules()),
        "corrupt_modules": store.corrupt_modules,
        "corrupt_checkpoints": store.corrupt_checkpoints,
    }


@contextmanager
def held_here(
    storage: str, run: str, job: str, take_over: bool = False, ttl_s: float = DEFAULT_TTL_S
) -> Iterator[HeldHere]:
    """Hold a run for the block: its lease is taken, kept by a thread, and given back. `job` is what others are told.

    LeaseHeldError when a driver that gives signs of life has it; a crashed one is followed, see RunStore.acquire.
    """
    store = RunStore.open(storage, run)
    epoch = store.acquire(this_process(job), ttl_s, take_over, wait_s=ttl_s + 1.0)
    ended = threading.Event()

    def keep_renewing() -> None:
        own = RunStore.open(storage, run)  # a RunStore is one thread's
        while not ended.wait(ttl_s / 3):
            with suppress(StorageError):  # tried again; a lost lease is met by the next write
                own.renew(epoch)

    thread = threading.Thread(target=keep_renewing, name="diki-lease", daemon=True)
    thread.start()
    try:
        yield HeldHere(store, epoch)
    finally:
        ended.set()
        thread.join()
        with suppress(FencedError):  # the run is another driver's now
            store.release(epoch)
