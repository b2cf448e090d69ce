"""What the rest of the library may ask of a run that is stored, whoever answers: storage itself, an actor, or a test.

`ReadableRun` is what anyone may ask. `HeldRun` adds what only the driver that holds the run's lease, and its workers,
may ask. `RunStore` (run_store.py) reads and writes storage in its own process: it is a ReadableRun, and its writing
methods take the epoch of the lease as well. The store client of `runs/` is a HeldRun: it asks the run's actor, the only
writer, and knows the epoch itself. `RunStore` says in full what each method promises.
"""

from typing import Any, Protocol, TypedDict

from diki_ray.store.log import Entry


class RunStatus(TypedDict):
    """Plain numbers about a held run and the process that writes it, for people and metrics."""

    pid: int
    driver_pid: int
    epoch: int
    version: int
    num_modules: int
    num_bytes: int
    corrupt_modules: int
    corrupt_checkpoints: int


class ReadableRun(Protocol):
    """A stored run as its readers see it. Reading needs no lease."""

    def modules(self) -> tuple[Entry, ...]:
        """Return the run's modules in the order in which their tasks were first committed."""
        ...

    def has_module(self, key: str) -> bool:
        """Tell whether a module under `key` is part of the run, at the same cost however many there are."""
        ...

    def read_module(self, digest: str) -> bytes:
        """Return the module's bytes, verified against their sha256; CorruptError otherwise."""
        ...

    def module_by_key(self, key: str) -> bytes:
        """Return the verified bytes of the run's, else the library's, module; StorageError when there is none."""
        ...

    def find_in_library(self, key: str) -> str | None:
        """Return the digest of the intact module that any run of this storage has committed under `key`."""
        ...

    def damaged_modules(self) -> tuple[Entry, ...]:
        """Return the run's modules whose blob is gone or altered, so that their tasks are trained again."""
        ...

    def load_checkpoint(self, key: str) -> tuple[int, bytes, dict[str, Any]] | None:
        """Return (step, blob, metadata) of the newest whole checkpoint of a key."""
        ...

    def get_document(self, name: str) -> Any:
        """Return the document: parsed when its name ends in .json, else its text; None when there is none."""
        ...


class HeldRun(ReadableRun, Protocol):
    """A run whose lease this driver holds, as the driver and its workers see it.

    What is written is durable when the call returns, and the same write twice is one. A driver that has lost the run
    to another gets FencedError.
    """

    @property
    def storage(self) -> str:
        """The storage in which the run lies: an absolute path or a bucket's URL."""
        ...

    @property
    def last_durable_write(self) -> float:
        """When the lease was last renewed, in seconds since 1970; 0 before the first time."""
        ...

    def commit_module(self, key: str, task: str, blob: bytes, metadata: dict[str, Any] | None = None) -> Entry:
        """Make a task's module part of the run. The same key for the same task is one entry."""
        ...

    def adopt_module(self, key: str, task: str) -> Entry | None:
        """Make the library's module under `key` part of the run; None when there is no intact one."""
        ...

    def save_checkpoint(self, key: str, step: int, blob: bytes, metadata: dict[str, Any] | None = None) -> None:
        """Keep a training state. The last two of a key are kept."""
        ...

    def drop_checkpoints(self, key: str) -> None:
        """Delete a key's checkpoints, once its module is committed."""
        ...

    def put_document(self, name: str, document: dict[str, Any] | list[Any] | str) -> None:
        """Write a small document for people: JSON for a dict or list, a str as it is."""
        ...

    def record_progress(self, event: dict[str, Any]) -> None:
        """Tell the driver what a worker does right now. The call does not wait, and the event may be lost."""
        ...

    def progress(self, since: int = 0) -> tuple[int, list[dict[str, Any]]]:
        """Return (next, events since number `since`); ask again with `since=next`."""
        ...

    def status(self) -> RunStatus:
        """Return plain numbers about the run and the process that writes it."""
        ...
