"""The run's store: a log that outlives any process, and the blobs it names. What was acknowledged is never lost.

The store knows nothing of torch: a module is bytes under a key. Its promises rest on two facts. Objects are created
atomically, durably and once (objects.py), and everything a reader believes is reached from the log (log.py,
run_log.py), whose entries are written only after what they point to. So a crash leaves at worst a blob nobody names,
never a name without its blob, and there is nothing to repair at start.

<storage>/library/…                  modules, shared by all runs of the storage (library.py)
<storage>/runs/<run>/log/…           what was committed, removed, rolled back, and by whom (run_log.py)
<storage>/runs/<run>/checkpoints/…   tasks in training (checkpoints.py)
<storage>/runs/<run>/results/…       small documents for people: configuration, results
<storage>/cache/…                    derived arrays, shared by all runs, safe to delete (caches.py)
"""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from diki_ray.errors import CorruptError, StorageError, UserError
from diki_ray.json_text import parsed
from diki_ray.store import upkeep as store_upkeep
from diki_ray.store.checkpoints import Checkpoints
from diki_ray.store.interface import ReadableRun
from diki_ray.store.library import Library, Record, checked_name
from diki_ray.store.log import Entry, Holder, State, canonical
from diki_ray.store.objects import Objects, checked_path
from diki_ray.store.run_log import RunLog
from diki_ray.store.upkeep import Problem, PurgeReport

CONFIG_DOCUMENT = "config.yaml"
"""The document that holds the configuration which a run was last evaluated with."""
_READABLE_BYTES = 4 * 2**20
_NUM_READERS = 4  # a bucket answers in tens of milliseconds; the blobs that are read at once are in memory
DEFAULT_TTL_S = 30.0  # how long a driver that died unseen, on another machine, keeps the run to itself


class RunStore(ReadableRun):
    """A run of a storage, read and written by this process.

    Writers pass the `epoch` that `acquire` gave them; readers need none. The object is not thread-safe: one thread at a
    time may write (the store actor sees to it).
    """

    def __init__(self, objects: Objects, run: str, salvage: bool = False) -> None:
        self.objects = objects
        self.run = checked_name(run, "run name")
        self.log = RunLog(objects, run, salvage)
        self.library = Library(objects)
        self.checkpoints = Checkpoints(objects, f"{self.log.folder}/checkpoints")

    @staticmethod
    def open(storage: str, run: str, salvage: bool = False) -> "RunStore":
        """Read the run's log from storage, verifying each entry; a run nobody has started yet is empty.

        CorruptError names a damaged or missing entry. With `salvage` such entries are passed over instead (and named in
        `log.damaged`): what they said is then lost.
        """
        return RunStore(Objects.open(storage), run, salvage)

    @staticmethod
    def runs(storage: str) -> tuple[str, ...]:
        """Return the names of all runs of a storage."""
        return Objects.open(storage).folders("runs")

    # Who may write

    def acquire(
        self, holder: Holder, ttl_s: float = DEFAULT_TTL_S, take_over: bool = False, wait_s: float = 0.0
    ) -> int:
        """Take the run and return the epoch to write with. Durable when it returns; the same holder twice is one lease.

        Of two racers exactly one wins. A holder whose process is seen to be dead on this machine is followed at once;
        any other holder keeps the run until `ttl_s` after its last `renew`. Up to `wait_s` is waited for that, less if
        it gives a sign of life; then LeaseHeldError says who holds the run. `take_over` doesn't ask: the holder's later
        writes raise FencedError.
        """
        return self.log.take_lease(holder, ttl_s, take_over, wait_s)

    def resume(self, holder: Holder) -> int:
        """Return the epoch `holder` has already, after a restart of its process; FencedError if it lost the run."""
        return self.log.resume_lease(holder)

    def renew(self, epoch: int) -> None:
        """Keep the lease for another `ttl_s`; FencedError when it was lost."""
        self.log.extend_lease(epoch)

    def release(self, epoch: int) -> None:
        """Give the run back, so that the next driver need not wait. Nothing can be written with `epoch` afterwards."""
        self.log.end_lease(epoch)

    # Modules

    @property
    def state(self) -> State:
        """What the log entries read so far add up to."""
        return self.log.state

    @property
    def version(self) -> int:
        """The number of the last log entry read: it grows with every change, so equal versions mean equal modules."""
        return self.log.state.seq

    def refresh(self) -> int:
        """Read what others have appended since, and return the new version."""
        return self.log.refresh().seq

    def modules(self) -> tuple[Entry, ...]:
        """Return the run's modules in the order in which their tasks were first committed."""
        return self.log.state.modules

    def has_module(self, key: str) -> bool:
        """Tell whether a module under `key` is part of the run."""
        return any(entry.key == key for entry in self.modules())

    def commit_module(
        self, epoch: int, key: str, task: str, blob: bytes, metadata: dict[str, Any] | None = None
    ) -> Entry:
        """Make a task's module part of the run; durable when it returns. The same key for the same task is one entry.

        Blob, then library key, then log entry: whatever a crash leaves out, nothing points to what is not there. If
        another run has put this key into the library before, its blob and metadata are taken (the first writer wins).
        A module of the task under another key is replaced, in the same place of the stream.
        """
        self.log.refresh()
        self.log.require(epoch)
        record = self.library.commit(key, blob, json.loads(canonical(metadata or {})))
        return self._enter(epoch, task, record)

    def replace_module(
        self, epoch: int, key: str, task: str, blob: bytes, metadata: dict[str, Any] | None = None
    ) -> Entry:
        """Put other bytes under the key of a module that the run has: the same module in a later format. Durable when
        it returns; what the key pointed to before stays until it is purged."""
        self.log.refresh()
        self.log.require(epoch)
        record = self.library.replace(key, blob, json.loads(canonical(metadata or {})))
        return self._enter(epoch, task, record)

    def adopt_module(self, epoch: int, key: str, task: str) -> Entry | None:
        """Make the library's module under `key` part of the run, untrained; None when there is no intact one."""
        self.log.refresh()
        self.log.require(epoch)
        record = self.library.find_intact(key)
        return self._enter(epoch, task, record) if record is not None else None

    def module_by_key(self, key: str) -> bytes:
        """Return the verified bytes of the run's, else the library's, module under `key`; StorageError without one."""
        digest = next((entry.digest for entry in self.modules() if entry.key == key), None) or self.find_in_library(key)
        if digest is None:
            raise StorageError(f"{self.objects.uri} has no intact module under key {key}: train its task first")
        return self.read_module(digest)

    def find_in_library(self, key: str) -> str | None:
        """Return the digest of the intact module that any run of this storage has committed under `key`."""
        record = self.library.find_intact(key)
        return record.digest if record is not None else None

    def read_module(self, digest: str) -> bytes:
        """Return the module's bytes, verified against their sha256; CorruptError otherwise."""
        return self.library.read(digest)

    def damaged_modules(self) -> tuple[Entry, ...]:
        """Return the modules whose blob is gone or altered: train their tasks again, committing puts them right."""
        entries = self.modules()
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            intact = list(pool.map(self.library.intact, (entry.digest for entry in entries)))
        return tuple(entry for entry, whole in zip(entries, intact, strict=True) if not whole)

    def remove_task(self, epoch: int, task: str) -> Entry:
        """Take a task out of the run, as if it had never been learnt, and return the entry that says so; twice is one.

        Its blob stays in the library until `purge`; `roll_back` can bring it back until then.
        """

        def done(state: State) -> bool:
            if state.module(task) is None and state.removal(task) is None:
                known = ", ".join(entry.task for entry in state.modules) or "none"
                raise UserError(f"run {self.run!r} has no task {task!r}; it has: {known}")
            return state.module(task) is None

        removal = self.log.append(epoch, "remove", done, lambda state: {"task": task}).removal(task)
        assert removal is not None
        return removal

    def roll_back(self, epoch: int, seq: int) -> tuple[Entry, ...]:
        """Make the run's modules what they were after log entry `seq`, and return them. Twice is one entry.

        It is an entry like any other: rolling back to the number before it undoes it, as long as nothing was purged.
        """
        target = self.log.state_at(seq).modules
        gone = [entry.task for entry in target if not self.library.intact(entry.digest)]
        if gone:
            raise UserError(
                f"run {self.run!r} can't go back to entry {seq}: the modules of {', '.join(gone)} were purged"
            )
        metadata = {"to": seq, "modules": [vars(entry) for entry in target]}
        return self.log.append(
            epoch, "rollback", lambda state: state.modules == target, lambda state: {"metadata": metadata}
        ).modules

    def compact(self, epoch: int) -> int:
        """Write a snapshot, so that opening need not read the whole log; return the number of the last entry in it.

        The log's entries stay (about 1 KB each): they are the history that `roll_back` needs, and as nothing is
        deleted there is no moment in which state is missing, nor a number a fenced writer could use a second time.
        """
        self.log.refresh()
        self.log.require(epoch)
        return self.log.take_snapshot()

    # Tasks in training

    def save_checkpoint(
        self, epoch: int, key: str, step: int, blob: bytes, metadata: dict[str, Any] | None = None
    ) -> None:
        """Keep a training state; durable when it returns. The last two of a key are kept."""
        self.log.refresh()
        self.log.require(epoch)
        self.checkpoints.save(key, step, blob, json.loads(canonical(metadata or {})))

    def load_checkpoint(self, key: str) -> tuple[int, bytes, dict[str, Any]] | None:
        """Return (step, blob, metadata) of a key's newest whole checkpoint; damaged ones are skipped and counted."""
        return self.checkpoints.load(key)

    def drop_checkpoints(self, epoch: int, key: str) -> None:
        """Delete a key's checkpoints, once its module is committed."""
        self.log.refresh()
        self.log.require(epoch)
        self.checkpoints.drop(key)

    @property
    def corrupt_checkpoints(self) -> int:
        """How many damaged checkpoints this object has met."""
        return self.checkpoints.corrupt

    @property
    def corrupt_modules(self) -> int:
        """How many damaged modules and keys this object has met."""
        return self.library.corrupt

    # Documents

    def put_document(self, epoch: int, name: str, document: dict[str, Any] | list[Any] | str) -> None:
        """Write `results/<name>` atomically: JSON for a dict or list, a str as it is. Durable when it returns.

        A fenced writer is refused here too, but a document is replaced in place: one whose writer lost the run within
        the very write may still land. It is derived from the log's modules, and the new holder writes it again.
        """
        self.log.refresh()
        self.log.require(epoch)
        text = document if isinstance(document, str) else _readable(document)
        self.objects.put(self._document(name), text.encode())

    def get_document(self, name: str) -> Any:
        """Return the document: parsed when its name ends in .json, else its text; None when there is none."""
        data = self.objects.get(self._document(name))
        if data is None:
            return None
        try:
            return parsed(data) if name.endswith(".json") else data.decode()
        except ValueError as error:
            raise CorruptError(
                f"{self.objects.uri}/{self._document(name)} is damaged: {error}; run the job again"
            ) from error

    # Upkeep

    def purge(self, epoch: int, dry_run: bool = False) -> PurgeReport:
        """Delete the library's blobs that no run of this storage refers to, and report what and how many bytes.

        Refused (LeaseHeldError) while another run is held, for its driver may be about to refer to one of them. After a
        purge `roll_back` can't bring the deleted modules back.
        """
        self.log.refresh()
        self.log.require(epoch)
        return store_upkeep.purge(self.log, self.library, dry_run)

    def verify(self) -> tuple[Problem, ...]:
        """Read all of the run (log, modules, keys, checkpoints, documents) and return everything that is wrong."""
        return store_upkeep.verify(self.log, self.library, self.checkpoints)

    def export(self, path: str) -> int:
        """Copy the run, without caches, to a folder or .tar that opens as a storage; return how many bytes it has."""
        return store_upkeep.export_run(self.log, self.library, path)

    @staticmethod
    def import_(storage: str, run: str, path: str) -> "RunStore":
        """Copy an exported run in. Stopped half-way it is an earlier state; a second call completes it."""
        store_upkeep.import_run(Objects.open(storage), checked_name(run, "run name"), path)
        return RunStore.open(storage, run)

    def _enter(self, epoch: int, task: str, record: Record) -> Entry:
        def is_in(state: State) -> bool:
            entry = state.module(task)
            return entry is not None and (entry.key, entry.digest) == (record.key, record.digest)

        entry = self.log.append(epoch, "module", is_in, lambda state: {"task": task, **vars(record)}).module(task)
        assert entry is not None
        return entry

    def _document(self, name: str) -> str:
        return checked_path(f"{self.log.folder}/results/{name}")


def _readable(document: dict[str, Any] | list[Any]) -> str:
    """JSON with a line for every value, but without where it is so large that nobody reads it: the results of a
    thousand tasks have a third of the bytes then."""
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False)
    if len(text) <= _READABLE_BYTES:
        return text
    return json.dumps(document, separators=(",", ":"), sort_keys=True, allow_nan=False)
