"""What the store's tests share: drivers, damage, and storage that fails at the n-th change as disks and services do."""

import dataclasses
import errno
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from diki_ray.errors import DiskFullError, StorageError
from diki_ray.store.log import Holder
from diki_ray.store.objects import LocalObjects, ObjectInfo, Objects, Writer
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore

BLOB = b"prompts" * 1000
KILLED = 77  # exit status of a process that a fault killed


def no_sync(descriptor: int) -> None:
    """Instead of os.fsync, most of a test's time: processes die here, not machines, and the kernel keeps its part."""


def elsewhere() -> Holder:
    """A driver on another machine: whether it lives can't be seen from here."""
    return dataclasses.replace(this_process(), host="node-7", machine="another boot", user="alice")


def held(objects: Objects, run: str = "run", **options) -> tuple[RunStore, int]:
    store = RunStore(objects, run)
    return store, store.acquire(elsewhere(), **options)


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


class FaultyObjects(Objects):
    """Passes everything on; the change number `at` (1 = the first put or delete) fails in the given way.

    full, io-error: nothing is changed, an error is raised. lost-answer: changed, and an error all the same.
    kill-before, kill-after: the process ends there. kill-torn: it ends with half of a temporary file on the disk.
    """

    def __init__(self, inner: Objects, at: int, way: str) -> None:
        self.uri = inner.uri
        self._inner = inner
        self._at = at
        self._way = way
        self.num_changes = 0
        self.failed_path: str | None = None

    def put(self, path: str, data: bytes, create_only: bool = False) -> bool:
        return self._change(path, data, lambda: self._inner.put(path, data, create_only))

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            self._change(path, b"", lambda path=path: self._inner.delete([path]))

    def get(self, path: str, start: int = 0, stop: int | None = None) -> bytes | None:
        return self._inner.get(path, start, stop)

    def open_writer(self, path: str) -> AbstractContextManager[Writer]:
        return self._inner.open_writer(path)

    def list(self, prefix: str) -> tuple[ObjectInfo, ...]:
        return self._inner.list(prefix)

    def exists(self, path: str) -> bool:
        return self._inner.exists(path)

    def folders(self, prefix: str) -> tuple[str, ...]:
        return self._inner.folders(prefix)

    def settle(self, folder: str) -> None:
        self._inner.settle(folder)

    def sweep(self, older_than_s: float) -> int:
        return self._inner.sweep(older_than_s)

    def _change(self, path, data, act):
        self.num_changes += 1
        if self.num_changes != self._at:
            return act()
        self.failed_path = path
        if self._way == "full":
            raise DiskFullError(f"cannot write {path}: {os.strerror(errno.ENOSPC)} (0 bytes free)")
        if self._way == "io-error":
            raise StorageError(f"cannot write {path}: {os.strerror(errno.EIO)}")
        if self._way == "lost-answer":
            act()
            raise StorageError(f"cannot write {path}: connection reset by peer")
        if self._way == "kill-torn":
            assert isinstance(self._inner, LocalObjects)
            file = Path(self.uri, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_name(f".{file.name}.0123.tmp").write_bytes(data[: len(data) // 2])
        if self._way == "kill-after":
            act()
        os._exit(KILLED)
