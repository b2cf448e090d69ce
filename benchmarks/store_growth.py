"""What a store's calls take with 1 to 10,000 modules in it, on a local disk, and how many requests a bucket would get.

One run grows from size to size. Its blobs are small, for their bytes are counted elsewhere: a commit writes them, and
opening reads none.
"""

from __future__ import annotations

import pickle
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from benchmarks.timing import timed
from diki_ray.store.objects import LocalObjects, ObjectInfo
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore


class Counted(LocalObjects):
    """A folder that counts what would be requests to a bucket."""

    requests = 0

    def get(self, path: str, start: int = 0, stop: int | None = None) -> bytes | None:
        self.requests += 1
        return super().get(path, start, stop)

    def put(self, path: str, data: bytes, create_only: bool = False) -> bool:
        self.requests += 1
        return super().put(path, data, create_only)

    def list(self, prefix: str) -> tuple[ObjectInfo, ...]:
        found = super().list(prefix)
        self.requests += 1 + len(found) // 1000  # a page has so many
        return found

    def delete(self, paths: Iterable[str]) -> None:
        gone = tuple(paths)
        self.requests += len(gone)
        super().delete(gone)

    def exists(self, path: str) -> bool:
        self.requests += 1
        return super().exists(path)

    def of(self, act: Callable[[], Any]) -> int:
        """The requests of an act."""
        before = self.requests
        act()
        return self.requests - before


BLOB_BYTES = 4096
MOST_COMMITS_TIMED = 50
RUN = "grown"


def store_growth(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each number of modules, in milliseconds; `verify` is without the model's part, which parses modules."""
    with tempfile.TemporaryDirectory() as storage:
        store = RunStore(Counted(storage), RUN)
        epoch = store.acquire(this_process("benchmark"), ttl_s=3600.0)
        return [_grown_to(storage, store, epoch, size) for size in sorted(sizes)]


def _grown_to(storage: str, store: RunStore, epoch: int, size: int) -> dict[str, Any]:
    commits = [_ms(partial(_commit, store, epoch, n)) for n in range(len(store.modules()), size)]
    opened = _ms(lambda: RunStore.open(storage, RUN))
    snapshot = _ms(lambda: store.compact(epoch))
    (kept,) = store.objects.list(f"{store.log.folder}/snapshots")
    from_snapshot = _ms(lambda: RunStore.open(storage, RUN))
    store.objects.delete([kept.path])  # so that the next size opens from the log again
    objects = store.objects
    assert isinstance(objects, Counted)
    row = {
        "modules": size,
        "commit_ms": statistics.median(commits[-MOST_COMMITS_TIMED:]),
        "open_ms": opened,
        "compact_ms": snapshot,
        "open_compacted_ms": from_snapshot,
        "read_all_ms": _ms(store.damaged_modules),
        "verify_ms": _ms(store.verify),
        "remove_ms": _ms(lambda: store.remove_task(epoch, f"task {size - 1}")),
        "snapshot_bytes": kept.num_bytes,
        "told_to_workers_bytes": len(pickle.dumps(store.modules())),
        "commit_requests": objects.of(lambda: _commit(store, epoch, 10**9 + size)),
        "checkpoint_requests": objects.of(lambda: store.save_checkpoint(epoch, "k", size, b"state")),
        "open_requests": objects.of(lambda: RunStore(objects, RUN)),
    }
    return row


def _commit(store: RunStore, epoch: int, number: int) -> None:
    blob = number.to_bytes(8, "little") * (BLOB_BYTES // 8)
    metadata = {"task": f"task {number}", "num_classes": 10, "method": "diki", "cost": {"wall_s": 1.0, "cpu_s": 1.0}}
    store.commit_module(epoch, f"{number:064x}", f"task {number}", blob, metadata)


def _ms(act: Callable[[], Any]) -> float:
    return 1000 * timed("cpu", act)
