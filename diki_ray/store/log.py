"""The run's log as values: entries, the state they add up to, and who holds the run. No I/O, no Ray.

A run is an append-only list of entries, numbered from 1. Entry n is created once (put-if-absent) and never changed, so
all readers agree on every prefix. A lease is an entry too: its `epoch` is one higher than any before it, and an entry
of an older epoch, or of a released lease, counts for nothing.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from diki_ray.errors import CorruptError, StorageError

FORMAT = 1  # raised when an older diki_ray could misread what a newer one writes
Kind = Literal["lease", "release", "module", "remove", "rollback"]


@dataclass(frozen=True)
class Entry:
    """One line of the log. `task`, `key`, `digest`, `num_bytes` are set for modules; `time` is seconds since 1970."""

    seq: int
    kind: Kind
    epoch: int
    time: float
    task: str = ""
    key: str = ""
    digest: str = ""
    num_bytes: int = 0
    # module: what its trainer said about it; lease: holder and ttl_s; rollback: the modules that remain
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Holder:
    """Who holds a run: enough for a person to find the process, and for this machine to see that it is dead."""

    host: str
    machine: str  # boot and process namespace: two containers may share a host name, never this
    pid: int
    started: str  # the kernel's start time of that process: a pid is used again, the pair is not
    user: str
    job: str
    token: str  # drawn once per driver: tells a retry from a rival

    def describe(self) -> str:
        """Return the holder in words, as error sentences name it."""
        job = f", job {self.job}" if self.job else ""
        return f"{self.user} (pid {self.pid} on {self.host}{job})"


@dataclass(frozen=True)
class State:
    """What a prefix of the log adds up to."""

    seq: int = 0
    epoch: int = 0
    lease: Entry | None = None  # of the newest epoch; None once it is released
    tokens: tuple[str, ...] = ()  # every holder there ever was, in order
    modules: tuple[Entry, ...] = ()  # in stream order: a task keeps its place when its module is replaced
    removed: tuple[Entry, ...] = ()  # the remove entry of each task that is not there any more

    def module(self, task: str) -> Entry | None:
        """Return the entry of the task's module; None when the run has none."""
        return next((entry for entry in self.modules if entry.task == task), None)

    def removal(self, task: str) -> Entry | None:
        """Return the entry that removed the task; None when it was not removed."""
        return next((entry for entry in self.removed if entry.task == task), None)


def follow(state: State, entry: Entry) -> State:
    """Return the state after one more entry. An entry of a writer that had lost the run only moves the number on."""
    after = replace(state, seq=entry.seq)
    if entry.kind == "lease":
        if entry.epoch <= state.epoch:
            return after
        return replace(after, epoch=entry.epoch, lease=entry, tokens=(*state.tokens, holder_of(entry).token))
    if entry.epoch < state.epoch or (entry.epoch == state.epoch and state.lease is None):
        return after
    if entry.kind == "release":
        return replace(after, epoch=entry.epoch, lease=None)
    others = tuple(gone for gone in state.removed if gone.task != entry.task)
    if entry.kind == "module":
        return replace(after, modules=_with_module(state.modules, entry), removed=others)
    if entry.kind == "remove":
        kept = tuple(module for module in state.modules if module.task != entry.task)
        return replace(after, modules=kept, removed=(*others, entry))
    # A rollback carries the modules it leaves, so that following it needs no look into the past.
    return replace(after, modules=tuple(Entry(**module) for module in entry.metadata["modules"]), removed=())


def replay(entries: Iterable[Entry], state: State | None = None) -> State:
    """Return the state after `entries`, from `state` (default: the empty run)."""
    state = state or State()
    for entry in entries:
        state = follow(state, entry)
    return state


def holder_of(lease: Entry) -> Holder:
    """Return the holder that a lease entry names."""
    return Holder(**lease.metadata["holder"])


def ttl_of(lease: Entry) -> float:
    """Return for how many seconds a lease lasts after each renewal."""
    return float(lease.metadata["ttl_s"])


def seconds_left(lease: Entry | None, renewed_at: float, now: float, holder_is_dead: bool) -> float:
    """Return for how long the run is still held, in seconds; 0 when anyone may take it.

    `renewed_at` is the holder's last heartbeat, by its clock. Clocks that disagree make a wait longer or a takeover
    earlier; they cannot do harm, because an overtaken holder's writes are refused by their epoch.
    """
    if lease is None or holder_is_dead:
        return 0.0
    return max(0.0, max(lease.time, renewed_at) + ttl_of(lease) - now)


def held_sentence(run: str, lease: Entry, renewed_at: float, now: float, left_s: float) -> str:
    """Return the sentence that tells another driver who holds the run, and what it can do about it."""
    since = datetime.fromtimestamp(lease.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return (
        f"run {run!r} is held by {holder_of(lease).describe()} since {since}, last heard of "
        f"{max(0.0, now - max(lease.time, renewed_at)):.0f} s ago. Wait for it to end, or take the run over "
        "with run.take_over=true (its later writes are then refused). If it crashed, its hold ends by itself in "
        f"{left_s:.0f} s"
    )


def encode_entry(entry: Entry) -> bytes:
    return seal({"format": FORMAT, **asdict(entry)})


def decode_entry(data: bytes, where: str) -> Entry:
    return Entry(**_checked_format(unseal(data, where), where))


def encode_state(state: State) -> bytes:
    return seal({"format": FORMAT, **asdict(state)})


def decode_state(data: bytes, where: str) -> State:
    fields = _checked_format(unseal(data, where), where)
    lists = {name: tuple(Entry(**entry) for entry in fields[name]) for name in ("modules", "removed")}
    lease = Entry(**fields["lease"]) if fields["lease"] else None
    return State(fields["seq"], fields["epoch"], lease, tuple(fields["tokens"]), **lists)


def seal(content: dict[str, Any]) -> bytes:
    """Return JSON that carries its own sha256: a flipped or missing byte anywhere is noticed when it is read."""
    body = canonical(content)
    return b'{"content":' + body + b',"sha256":"' + digest_of(body).encode() + b'"}\n'


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """Return what `seal` was given; CorruptError naming `where` for anything else."""
    try:
        document = json.loads(data)
        content, promised = document["content"], document["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{where} is damaged: it is no sealed JSON document ({error})") from error
    if not isinstance(content, dict) or digest_of(canonical(content)) != promised:
        raise CorruptError(f"{where} is damaged: its checksum does not match its content")
    return content


def canonical(content: Any) -> bytes:
    """Return the one JSON text that stands for `content`; ValueError for NaN and infinity."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest_of(data: bytes) -> str:
    """Return the sha256 of the bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _with_module(modules: tuple[Entry, ...], entry: Entry) -> tuple[Entry, ...]:
    if any(module.task == entry.task for module in modules):
        return tuple(entry if module.task == entry.task else module for module in modules)
    return (*modules, entry)


def _checked_format(fields: dict[str, Any], where: str) -> dict[str, Any]:
    version = fields.pop("format", None)
    if version != FORMAT:
        raise StorageError(f"{where} has format {version}, this diki_ray reads {FORMAT}: use the version that wrote it")
    return fields
