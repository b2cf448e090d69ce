"""The store's actor as drivers and workers see it: plain calls that outlive its restarts, and plain errors.

A driver first acquires the run's lease in storage and then starts the actor. So of two drivers one is refused before it
touches anything, and whatever actor of the run the other finds belongs to a driver that lost it, and is ended.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from diki_ray.errors import FencedError, StorageError, UserError
from diki_ray.runs.cluster import beside_this_process
from diki_ray.runs.store_actor import Outcome, RunHandle, StoreActor
from diki_ray.store.interface import HeldRun, RunStatus
from diki_ray.store.log import Entry
from diki_ray.store.objects import Objects
from diki_ray.store.process import this_process
from diki_ray.store.run_store import DEFAULT_TTL_S, RunStore

T = TypeVar("T")
U = TypeVar("U")
P = ParamSpec("P")

NAMESPACE = "diki_ray"
DEFAULT_TIMEOUT_S = 120.0  # a restarted actor is back in seconds; storage may be away for longer
_RETRY_S = 0.2
_NUM_THREADS = 4  # readers and heartbeats are not to wait behind a slow write


class StoreClient(HeldRun):
    """The store as drivers and workers see it: plain calls that wait while the actor restarts, and plain errors.

    The driver makes one with `start`, sends it to its workers (a copy there reaches the same actor), and ends it with
    `stop`. A call is tried for `timeout_s`; then StorageError. Once another driver has the run, writing is FencedError.
    """

    def __init__(self, handle: RunHandle, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.handle = handle
        self._last_durable_write = 0.0
        self._timeout_s = timeout_s
        self._cached_actor: Any = None
        self._known: tuple[int, tuple[Entry, ...]] = (-1, ())
        self._direct: RunStore | None = None
        self._objects: Callable[[str], Objects] = Objects.open
        self._owns_run = False
        self._stopped = threading.Event()
        self._lost: UserError | None = None

    @staticmethod
    def start(
        storage: str,
        run: str,
        *,
        ttl_s: float = DEFAULT_TTL_S,
        take_over: bool = False,
        wait_s: float | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        objects: Callable[[str], Objects] = Objects.open,
    ) -> "StoreClient":
        """Take the run for this driver and start its store.

        LeaseHeldError when a driver that gives signs of life has it. One that crashed is followed: at once when it ran
        on this machine or with `take_over`, else `ttl_s` after its last sign of life (`wait_s` limits the wait).
        """
        holder = this_process(_job_id())
        located = objects(storage)
        wait_s = ttl_s + 1.0 if wait_s is None else wait_s
        epoch = RunStore(located, run).acquire(holder, ttl_s, take_over, wait_s)
        client = StoreClient(RunHandle(located.uri, run, holder, epoch, ttl_s), timeout_s)
        client._owns_run = True
        client._objects = objects
        try:
            client._create_actor(time.monotonic() + timeout_s)
            client._renew()  # answers when the actor is up, in which a cluster may take its time
        except BaseException:
            RunStore(located, run).release(epoch)  # the next try need not wait for a lease that nobody uses
            raise
        threading.Thread(target=client._keep_renewing, name="diki-store-lease", daemon=True).start()
        return client

    def stop(self) -> None:
        """Release the run and end its actor. Only for the client that `start` made; twice is no error."""
        if not self._owns_run or self._stopped.is_set():
            return
        self._stopped.set()
        try:
            # Not through the actor: a driver that ends because its cluster is in trouble still gives the run back.
            self._storage().release(self.handle.epoch)
        except FencedError:
            return  # the run is another driver's now, and so is the actor of that name
        if ray.is_initialized():
            with contextlib.suppress(ValueError):  # nobody has the name: it is gone already
                ray.kill(self._actor(), no_restart=True)

    @property
    def storage(self) -> str:
        """The storage in which the run lies: an absolute path or a bucket's URL."""
        return self.handle.storage

    @property
    def last_durable_write(self) -> float:
        """When this driver last renewed its lease, every third of its time to live; in seconds since 1970."""
        return self._last_durable_write

    # Modules (RunStore says what each method promises)

    def snapshot(self) -> tuple[int, tuple[Entry, ...]]:
        """Return (version, modules). Equal versions are equal modules; an unchanged one costs a few bytes."""

        def fetched(reply: tuple[int, list[ray.ObjectRef]]) -> tuple[int, tuple[Entry, ...]]:
            version, references = reply
            return (version, ray.get(references[0])) if references else self._known

        self._known = self._ask_for(fetched, StoreActor.snapshot, self._known[0])
        return self._known

    def modules(self) -> tuple[Entry, ...]:
        return self.snapshot()[1]

    def has_module(self, key: str) -> bool:
        return self._read(RunStore.has_module, key)

    def read_module(self, digest: str) -> bytes:
        return self._ask_for(lambda references: ray.get(references[0]), StoreActor.module, digest)

    def commit_module(self, key: str, task: str, blob: bytes, metadata: dict[str, Any] | None = None) -> Entry:
        return self._write(RunStore.commit_module, key, task, blob, metadata)

    def adopt_module(self, key: str, task: str) -> Entry | None:
        return self._write(RunStore.adopt_module, key, task)

    def module_by_key(self, key: str) -> bytes:
        return self._read(RunStore.module_by_key, key)

    def find_in_library(self, key: str) -> str | None:
        return self._read(RunStore.find_in_library, key)

    def damaged_modules(self) -> tuple[Entry, ...]:
        return self._read(RunStore.damaged_modules)

    # Tasks in training, and documents

    def save_checkpoint(self, key: str, step: int, blob: bytes, metadata: dict[str, Any] | None = None) -> None:
        self._write(RunStore.save_checkpoint, key, step, blob, metadata)

    def load_checkpoint(self, key: str) -> tuple[int, bytes, dict[str, Any]] | None:
        return self._read(RunStore.load_checkpoint, key)

    def drop_checkpoints(self, key: str) -> None:
        self._write(RunStore.drop_checkpoints, key)

    def put_document(self, name: str, document: dict[str, Any] | list[Any] | str) -> None:
        self._write(RunStore.put_document, name, document)

    def get_document(self, name: str) -> Any:
        return self._read(RunStore.get_document, name)

    # What happens right now

    def record_progress(self, event: dict[str, Any]) -> None:
        """Tell the driver what a worker does right now. The call does not wait, and the event may be lost."""
        with contextlib.suppress(ValueError, RayActorError):  # nobody has the actor's name, or its process died
            self._actor().record_progress.remote(event)

    def progress(self, since: int = 0) -> tuple[int, list[dict[str, Any]]]:
        """Return (next, events since); ask again with `since=next`. Events of an actor that was killed are lost."""
        return self._ask(StoreActor.progress, since)

    def status(self) -> RunStatus:
        return self._ask(StoreActor.status)

    def _write(self, method: Callable[Concatenate[RunStore, int, P], T], *args: P.args, **named: P.kwargs) -> T:
        """Have the actor call a writing method of RunStore in this client's epoch."""
        self._check_not_lost()
        return cast(T, self._ask(StoreActor.write, self.handle.epoch, method, *args, **named))

    def _read(self, method: Callable[Concatenate[RunStore, P], T], *args: P.args, **named: P.kwargs) -> T:
        """Have the actor call a reading method of RunStore."""
        return cast(T, self._ask(StoreActor.read, method, *args, **named))

    def _ask(self, method: Callable[Concatenate[StoreActor, P], Outcome[T]], *args: P.args, **named: P.kwargs) -> T:
        return self._ask_for(lambda value: value, method, *args, **named)

    def _ask_for(
        self,
        unpack: Callable[[T], U],
        method: Callable[Concatenate[StoreActor, P], Outcome[T]],
        *args: P.args,
        **named: P.kwargs,
    ) -> U:
        """Call a method of the actor until it answers or the time is over; return what `unpack` makes of its value.

        What the actor raised is raised here.
        """
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                reply = getattr(self._actor(), method.__name__).remote(*args, **named)
                outcome: Outcome[T] = ray.get(reply, timeout=max(0.0, deadline - time.monotonic()))
                if isinstance(outcome.error, FencedError):
                    self._lost = outcome.error
                return unpack(outcome.unwrap())
            except RayTaskError:
                raise  # a defect of ours, with its traceback; some of these are ValueErrors as well
            # ValueError: nobody has that name (yet). ObjectLostError: the actor died with bytes it had just offered.
            except (RayActorError, GetTimeoutError, ObjectLostError, ValueError) as error:
                self._cached_actor = None
                if time.monotonic() >= deadline:
                    raise StorageError(
                        f"the store of run {self.handle.run!r} did not answer for {self._timeout_s:.0f} s "
                        f"({type(error).__name__}): see that the cluster and {self.handle.storage} work, and run again"
                    ) from error
                time.sleep(_RETRY_S)
                if self._owns_run and isinstance(error, RayActorError | ValueError):
                    self._revive_actor(deadline)

    def _check_not_lost(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _actor(self) -> Any:
        if self._cached_actor is None:
            self._cached_actor = ray.get_actor(actor_name(self.handle.storage, self.handle.run), NAMESPACE)
        return self._cached_actor

    def _revive_actor(self, deadline: float) -> None:
        """Start the actor again if it is gone for good: someone ended it, perhaps a driver that then lost the race."""
        try:
            ray.get_actor(actor_name(self.handle.storage, self.handle.run), NAMESPACE)
        except ValueError:
            self._storage().resume(self.handle.holder)  # FencedError: it was ended by the run's new holder
            self._create_actor(deadline)

    def _create_actor(self, deadline: float) -> None:
        name = actor_name(self.handle.storage, self.handle.run)
        options = {
            "name": name,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": -1,
            "max_task_retries": -1,
            "max_concurrency": _NUM_THREADS,
            **beside_this_process(),  # the storage may be its node's disk
        }
        while True:
            with contextlib.suppress(ValueError):  # nobody has the name
                ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)  # it holds an older lease than ours
            try:
                self._cached_actor = ray.remote(StoreActor).options(**options).remote(self.handle, self._objects)
                return
            except ValueError:  # the name is not free yet
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_RETRY_S)

    def _keep_renewing(self) -> None:
        while not self._stopped.wait(self.handle.ttl_s / 3):
            if not ray.is_initialized():
                return  # the driver has shut Ray down; asking would start a cluster of its own
            try:
                self._renew()
            except FencedError:
                return  # the next call says so
            except StorageError as error:
                print(f"diki_ray: the lease of run {self.handle.run!r} could not be renewed, trying on: {error}")

    def _renew(self) -> None:
        self._check_not_lost()
        self._ask(StoreActor.renew, self.handle.epoch)
        self._last_durable_write = time.time()

    def _storage(self) -> RunStore:
        if self._direct is None:
            self._direct = RunStore(self._objects(self.handle.storage), self.handle.run)
        return self._direct

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreClient, (self.handle, self._timeout_s)


def _job_id() -> str:
    """Return the name to give `ray job stop`, where this driver is a submitted job."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    return submitted.get("job_submission_id") or ray.get_runtime_context().get_job_id()


def actor_name(storage: str, run: str) -> str:
    """Return the actor's name, in which the storage counts: two may have runs of one name, in one cluster."""
    return f"diki-store-{run}-{hashlib.sha256(storage.encode()).hexdigest()[:8]}"
