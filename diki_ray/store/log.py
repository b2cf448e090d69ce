"""The run's log as values: entries, the state they add up to, and who holds the run. No I/O, no Ray.

A run is an append-only list of entries, numbered from 1. Entry n is created once (put-if-absent) and never changed, so
all readers agree on every prefix. A lease is an entry too: its `epoch` is one higher than any before it, and an entry
of an older epoch, or of a released lease, counts for nothing.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from diki_ray.errors import CorruptError, StorageError
from diki_ray.json_text import parsed

FORMAT = 1  # raised when an older diki_ray could misread what a newer one writes
Kind = Literal["lease", "release", "module", "remove", "rollback"]


T = TypeVar("T")
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""What is read back has no other fields, no number for a text and no NaN."""
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Text = Annotated[str, Field(max_length=4096)]
_LAST_TIME = 253_402_300_799  # the end of the year 9999, the last that Python's dates know
_KEY, _DIGEST = r"[A-Za-z0-9][A-Za-z0-9._+=@,-]{0,199}", r"[0-9a-f]{64}"


@dataclass(frozen=True)
class Entry:
    """One line of the log. `task`, `key`, `digest`, `num_bytes` are set for modules; `time` is seconds since 1970."""

    __pydantic_config__ = _STRICT

    seq: _Count
    kind: Kind
    epoch: Annotated[int, Field(ge=-1, lt=2**63)]
    time: Annotated[float, Field(ge=0, le=_LAST_TIME)]
    task: _Text = ""
    key: _Text = ""
    digest: _Text = ""
    num_bytes: _Count = 0
    # module: what its trainer said about it; lease: holder and ttl_s; rollback: the modules that remain
    metadata: dict[str, Any] = field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        """What a stored entry must have beside its types; entries made here are not asked."""
        if self.kind == "lease":
            _HOLDER.validate_json(canonical(self.metadata.get("holder")))
            ttl = self.metadata.get("ttl_s")
            if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not 0 <= ttl <= _LAST_TIME:
                raise ValueError("the lease has no ttl_s in seconds")
        if self.kind == "module" and not (self.task and re.fullmatch(_KEY, self.key)):
            raise ValueError("the module has no task or no key")
        if self.kind == "module" and not re.fullmatch(_DIGEST, self.digest):
            raise ValueError("the module's digest is none")
        if self.kind == "rollback":
            left = _ENTRIES.validate_json(canonical(self.metadata.get("modules")))
            if any(entry.kind != "module" for entry in left):
                raise ValueError("the rollback leaves what is no module")
        return self


@dataclass(frozen=True)
class Holder:
    """Who holds a run: enough for a person to find the process, and for this machine to see that it is dead."""

    __pydantic_config__ = _STRICT

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

    __pydantic_config__ = _STRICT

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


class Replay:
    """A state to which entries are added one by one; an entry takes the same time however many modules there are."""

    def __init__(self, state: State | None = None) -> None:
        state = state or State()
        self.seq = state.seq
        self._epoch, self._lease, self._tokens = state.epoch, state.lease, list(state.tokens)
        self._modules = {entry.task: entry for entry in state.modules}
        self._removed = {entry.task: entry for entry in state.removed}

    def add(self, entry: Entry) -> bool:
        """Follow one more entry; one of a writer that had lost the run has no effect, and False is returned."""
        self.seq = entry.seq
        if entry.kind == "lease":
            if entry.epoch <= self._epoch:
                return False
            self._lease = entry
            self._tokens.append(holder_of(entry).token)
        elif entry.epoch < self._epoch or (entry.epoch == self._epoch and self._lease is None):
            return False
        elif entry.kind == "release":
            self._lease = None
        elif entry.kind == "rollback":
            # It carries the modules it leaves, so that following it needs no look into the past.
            self._modules = {m["task"]: Entry(**m) for m in entry.metadata["modules"]}
            self._removed = {}
            return True
        else:
            self._removed.pop(entry.task, None)
            if entry.kind == "module":
                self._modules[entry.task] = entry  # in the place of the one before, where there is one
            else:
                self._modules.pop(entry.task, None)
                self._removed[entry.task] = entry
            return True
        self._epoch = entry.epoch
        return True

    def state(self) -> State:
        """Return what all entries so far add up to."""
        modules, removed = tuple(self._modules.values()), tuple(self._removed.values())
        return State(self.seq, self._epoch, self._lease, tuple(self._tokens), modules, removed)


def follow(state: State, entry: Entry) -> State:
    """Return the state after one more entry."""
    return replay([entry], state)


def replay(entries: Iterable[Entry], state: State | None = None) -> State:
    """Return the state after `entries`, from `state` (default: the empty run)."""
    replayed = Replay(state)
    for entry in entries:
        replayed.add(entry)
    return replayed.state()


def holder_of(lease: Entry) -> Holder:
    """Return the holder that a lease entry names."""
    return Holder(**lease.metadata["holder"])


def ttl_of(lease: Entry) -> float:
    """Return for how many seconds a lease lasts after each renewal."""
    return float(lease.metadata["ttl_s"])


def renewed_at(heartbeat: dict[str, Any]) -> float:
    """Return when a heartbeat says that its holder lived, in seconds since 1970; CorruptError when it says nothing."""
    value = heartbeat.get("renewed_at")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CorruptError("the heartbeat says no time")
    return float(value)


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
    """Return the entry that `encode_entry` was given; CorruptError for anything that no driver writes."""
    return _checked(_ENTRY, _checked_format(unseal(data, where), where), where)


def encode_state(state: State) -> bytes:
    return seal({"format": FORMAT, **asdict(state)})


def decode_state(data: bytes, where: str) -> State:
    """Return the state that `encode_state` was given; CorruptError for anything that no driver writes."""
    return _checked(_STATE, _checked_format(unseal(data, where), where), where)


def seal(content: dict[str, Any]) -> bytes:
    """Return JSON that carries its own sha256: a flipped or missing byte anywhere is noticed when it is read."""
    body = canonical(content)
    return b'{"content":' + body + b',"sha256":"' + digest_of(body).encode() + b'"}\n'


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """Return what `seal` was given; CorruptError naming `where` for anything else."""
    try:
        document = parsed(data)
        content, promised = document["content"], document["sha256"]
        sealed = isinstance(content, dict) and digest_of(canonical(content)) == promised
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError(f"{where} is damaged: it is no sealed JSON document ({brief(error)})") from error
    if not sealed:
        raise CorruptError(f"{where} is damaged: its checksum does not match its content")
    return content


def canonical(content: Any) -> bytes:
    """Return the one JSON text that stands for `content`; ValueError for NaN and infinity."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest_of(data: bytes) -> str:
    """Return the sha256 of the bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


_HOLDER: TypeAdapter[Holder] = TypeAdapter(Holder)
_ENTRIES: TypeAdapter[tuple[Entry, ...]] = TypeAdapter(tuple[Entry, ...])
_ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)
_STATE: TypeAdapter[State] = TypeAdapter(State)


def _checked(adapter: TypeAdapter[T], fields: dict[str, Any], where: str) -> T:
    """The value of a document whose checksum holds: whoever writes a document can also seal it."""
    try:
        return adapter.validate_json(canonical(fields))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CorruptError(f"{where} is no document of a run: {place}: {first['msg']}") from None


def brief(error: Exception) -> str:
    """Return the first line of an error's message, at most 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _checked_format(fields: dict[str, Any], where: str) -> dict[str, Any]:
    version = fields.pop("format", None)
    if version != FORMAT:
        raise StorageError(
            f"{where} has format {version!r:.50}, this diki_ray reads {FORMAT}: use the version that wrote it"
        )
    return fields
