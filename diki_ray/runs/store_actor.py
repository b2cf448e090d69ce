"""The store's actor: one per run, the only writer of it.

Whether it may write is decided by the lease in storage, not by Ray: its driver acquired it before and the actor only
continues it. Started again by Ray it reads its state back from storage and goes on in the same epoch; every write names
the epoch of the client it came from, so a worker of an overtaken driver is refused even by its successor's actor.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

import ray

from diki_ray.errors import UserError
from diki_ray.store.held_here import status_of
from diki_ray.store.interface import RunStatus
from diki_ray.store.log import Holder
from diki_ray.store.objects import Objects
from diki_ray.store.run_store import DEFAULT_TTL_S, RunStore

_CACHED_BLOB_BYTES = 256 << 20  # about 140 modules, in the object store of the actor's node
_KEPT_EVENTS = 10_000
_ABANDONED_TTLS = 10  # an actor nobody renewed for this many lease times ends itself: its driver is gone

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True)
class RunHandle:
    """A held run as a value: what a worker needs to reach its store. Picklable; goes into a trainer's configuration."""

    storage: str
    run: str
    holder: Holder
    epoch: int
    ttl_s: float = DEFAULT_TTL_S


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a call gave: a value, or the user's error itself instead of Ray's account of it."""

    value: T | None = None
    error: UserError | None = None

    def unwrap(self) -> T:
        """Return the value; raise the error when there is one."""
        if self.error is not None:
            raise self.error
        return cast(T, self.value)


class StoreActor:
    """The writing side of one run. Every method that writes is idempotent: Ray calls it again after a crash."""

    def __init__(self, handle: RunHandle, objects: Callable[[str], Objects] = Objects.open) -> None:
        self._handle = handle
        self._objects = objects
        self._store: RunStore | None = None
        self._writing = threading.RLock()
        self._blobs: OrderedDict[str, tuple[ray.ObjectRef, int]] = OrderedDict()
        self._entries: tuple[int, ray.ObjectRef] | None = None
        self._events: deque[dict[str, Any]] = deque(maxlen=_KEPT_EVENTS)
        # Numbers go on above those of the process before this one, so that a reader's position stays valid.
        self._next_event = int(time.time() * 1000)
        self._renewed_at = time.monotonic()
        threading.Thread(target=self._end_when_abandoned, daemon=True).start()

    def write(
        self, epoch: int, method: Callable[Concatenate[RunStore, int, P], T], *args: P.args, **named: P.kwargs
    ) -> Outcome[T]:
        """Call a method of RunStore that changes the run, as the holder `epoch`; one at a time."""

        def act() -> T:
            with self._writing:
                return method(self._opened(), epoch, *args, **named)

        return _outcome(act)

    def read(self, method: Callable[Concatenate[RunStore, P], T], *args: P.args, **named: P.kwargs) -> Outcome[T]:
        """Call a method of RunStore that only reads."""
        return _outcome(lambda: method(self._opened(), *args, **named))

    def renew(self, epoch: int) -> Outcome[None]:
        """Keep the lease for the holder `epoch`. The actor of a run that nobody renews ends itself."""

        def act() -> None:
            with self._writing:
                self._opened().renew(epoch)
            self._renewed_at = time.monotonic()

        return _outcome(act)

    def snapshot(self, known_version: int) -> Outcome[tuple[int, list[ray.ObjectRef]]]:
        """Return (version, a list with a reference to the run's modules); the list is empty for the known version."""

        def act() -> tuple[int, list[ray.ObjectRef]]:
            with self._writing:
                store = self._opened()
                if store.version == known_version:
                    return known_version, []
                if self._entries is None or self._entries[0] != store.version:
                    self._entries = (store.version, ray.put(store.modules()))
                return self._entries[0], [self._entries[1]]

        return _outcome(act)

    def module(self, digest: str) -> Outcome[list[ray.ObjectRef]]:
        """Return a list with a reference to the module's verified bytes, which stay for the next reader."""

        def act() -> list[ray.ObjectRef]:
            with self._writing:
                if digest in self._blobs:
                    self._blobs.move_to_end(digest)
                    return [self._blobs[digest][0]]
            blob = self._opened().read_module(digest)
            with self._writing:
                self._blobs[digest] = (ray.put(blob), len(blob))
                reference = self._blobs[digest][0]
                while len(self._blobs) > 1 and sum(size for _, size in self._blobs.values()) > _CACHED_BLOB_BYTES:
                    self._blobs.popitem(last=False)
            return [reference]

        return _outcome(act)

    def record_progress(self, event: dict[str, Any]) -> None:
        """Keep an event for the driver to see. Not durable: the last 10,000, gone when this process is."""
        with self._writing:
            self._events.append(event)
            self._next_event += 1

    def progress(self, since: int) -> Outcome[tuple[int, list[dict[str, Any]]]]:
        """Return (next, events from number `since` on that are still there); ask again with `since=next`."""
        with self._writing:
            num_new = max(0, min(len(self._events), self._next_event - since))
            return Outcome((self._next_event, list(islice(self._events, len(self._events) - num_new, None))))

    def status(self) -> Outcome[RunStatus]:
        """Return plain numbers about the run and this process, for people and metrics."""

        return _outcome(lambda: status_of(self._opened(), self._handle.epoch, self._handle.holder.pid))

    def _opened(self) -> RunStore:
        """Return the run, read when this process needs it first; storage that is away is tried again next time."""
        with self._writing:
            if self._store is None:
                store = RunStore(self._objects(self._handle.storage), self._handle.run)
                store.resume(self._handle.holder)
                self._store = store
            return self._store

    def _end_when_abandoned(self) -> None:
        limit_s = _ABANDONED_TTLS * self._handle.ttl_s
        while time.monotonic() - self._renewed_at < limit_s:
            time.sleep(self._handle.ttl_s)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def _outcome(act: Callable[[], T]) -> Outcome[T]:
    try:
        return Outcome(value=act())
    except UserError as error:
        return Outcome(error=error)
