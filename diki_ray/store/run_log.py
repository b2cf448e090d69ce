"""The run's log on storage: reads what others appended, appends in its turn, never twice at one number.

runs/<run>/log/<seq>.json        entries, created once, never changed, never deleted
runs/<run>/snapshots/<seq>.json  the state after entry <seq>: a faster way to open a long log, nothing depends on it
runs/<run>/leases/<epoch>.json   when the holder of that epoch was last heard of (of its own: a late one harms nobody)
library/upkeep.json              there while someone purges or imports: no lease is given out meanwhile
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from diki_ray.errors import CorruptError, FencedError, LeaseHeldError, StorageError, UserError
from diki_ray.store.log import (
    Entry,
    Holder,
    Kind,
    Replay,
    State,
    decode_entry,
    decode_state,
    encode_entry,
    encode_state,
    follow,
    held_sentence,
    holder_of,
    renewed_at,
    replay,
    seal,
    seconds_left,
    unseal,
)
from diki_ray.store.objects import Objects
from diki_ray.store.process import is_alive

UPKEEP_LOCK = "library/upkeep.json"
_NUM_READERS = 16  # a bucket answers in tens of milliseconds: a thousand entries one by one would take half a minute
_MAX_RACES = 100  # losing this often in a row is no race, it is a storage that breaks its word
_KEPT_SNAPSHOTS = 2  # the newest may be damaged
_POLL_S = 0.5


class RunLog:
    """The log of one run on storage: `state` is what was read so far, `damaged` names what a salvage passed over."""

    def __init__(self, objects: Objects, run: str, salvage: bool = False) -> None:
        self.objects = objects
        self.run = run
        self.folder = f"runs/{run}"
        self.damaged: list[str] = []
        self._salvage = salvage
        self.state = self._newest_snapshot()
        self.refresh(listed=True)

    def refresh(self, listed: bool = False) -> State:
        """Follow what was appended since; `listed` reads many entries at once (the first time, a long log)."""
        last = max(self._listed_numbers(), default=0) if listed else 0
        entries = self.entries(self.state.seq + 1, last)
        while (entry := self._read(self.state.seq + 1 + len(entries))) is not None:
            entries.append(entry)
        if entries:
            self.state = replay(entries, self.state)
        return self.state

    def entries(self, first: int, last: int) -> list[Entry]:
        """Return entries first … last, verified; CorruptError for a missing one, as numbers have no gaps."""
        numbers = range(first, last + 1)
        if not numbers:
            return []
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            found = list(pool.map(self._read, numbers))
        entries = []
        for number, entry in zip(numbers, found, strict=True):
            if entry is not None:
                entries.append(entry)
            elif not self._salvage:
                raise self._lost(number, "is missing")
            else:
                self.damaged.append(self.path(number))
                entries.append(_gap(number))
        return entries

    def state_at(self, seq: int) -> State:
        """Return what the run was after entry `seq`."""
        if not 0 <= seq <= self.state.seq:
            raise UserError(f"run {self.run!r} has entries 1 to {self.state.seq}, there is no {seq}")
        return replay(self.entries(1, seq))

    def require(self, epoch: int) -> None:
        """Raise FencedError unless `epoch` holds the run, as far as the log has been read."""
        if self.state.lease is None or self.state.epoch != epoch:
            raise self._fenced()

    def append(
        self,
        epoch: int,
        kind: Kind,
        done: Callable[[State], bool],
        make: Callable[[State], dict[str, Any]] = lambda state: {},
    ) -> State:
        """Append one entry as the holder `epoch`, unless the newest state is `done` already; durable when it returns.

        The number is taken by put-if-absent: after losing one the log is read again, so a lease that won the race is
        seen before the next try, and nothing can be written behind its back.
        """
        for _ in range(_MAX_RACES):
            state = self.refresh()
            self.require(epoch)
            if done(state):
                # It may have been written by a process killed before the write was safe: make sure, then say so.
                self.objects.settle(f"{self.folder}/log")
                return state
            entry = Entry(seq=state.seq + 1, kind=kind, epoch=epoch, time=time.time(), **make(state))
            if self._create(entry):
                return self.state
        raise StorageError(
            f"{self.objects.uri}: entry {self.state.seq + 1} of run {self.run!r} can neither be made nor read"
        )

    def take_lease(self, holder: Holder, ttl_s: float, take_over: bool = False, wait_s: float = 0.0) -> int:
        """Take the run and return the new epoch; see RunStore.acquire."""
        deadline = time.monotonic() + wait_s
        for _ in range(_MAX_RACES):
            if holder.token in self.refresh().tokens:
                return self.resume_lease(holder)
            if not take_over:
                self._await_free(deadline)
            metadata = {"holder": vars(holder), "ttl_s": ttl_s}
            lease = Entry(self.state.seq + 1, "lease", self.state.epoch + 1, time.time(), metadata=metadata)
            if self._create(lease):
                self._check_conditional_puts(lease)
                self._yield_to_upkeep(lease)
                return lease.epoch
        raise StorageError(f"{self.objects.uri}: the lease of run {self.run!r} can neither be made nor read")

    def resume_lease(self, holder: Holder) -> int:
        """Return the epoch `holder` has already; FencedError when it lost it, StorageError if it never had it here."""
        state = self.refresh()
        if holder.token not in state.tokens:
            raise StorageError(
                f"{holder.host} took run {self.run!r}, but {self.objects.uri} as seen from here does not know of it: "
                "give a storage that all nodes share (a bucket, or a folder mounted on every node)"
            )
        if state.lease is None or holder_of(state.lease).token != holder.token:
            raise self._fenced()
        return state.epoch

    def extend_lease(self, epoch: int) -> None:
        """Say that the holder lives. An object of its own: a lease entry every few seconds would flood the log."""
        self.refresh()
        self.require(epoch)
        self.objects.put(self._heartbeat(epoch), seal({"renewed_at": time.time()}))

    def end_lease(self, epoch: int) -> None:
        """Give the run back; its epoch can't write any more. A second time it is no error."""
        state = self.refresh()
        if state.lease is not None or state.epoch != epoch:
            self.append(epoch, "release", lambda state: False)

    def take_snapshot(self) -> int:
        """Write the state down, so that opening need not read the log before it; return its last entry's number."""
        state = self.state
        self.objects.put(f"{self.folder}/snapshots/{state.seq:08d}.json", encode_state(state))
        old = [info.path for info in self.objects.list(f"{self.folder}/snapshots")][:-_KEPT_SNAPSHOTS]
        self.objects.delete(old)  # only after the new one is durable; the log itself stays whole in any case
        return state.seq

    def problems(self) -> list[tuple[str, str]]:
        """Return (path, what is wrong) of each entry or snapshot that is damaged, missing or without effect."""
        found = [
            (path, "a damaged snapshot: the log is read instead") for path in self.damaged if "/snapshots/" in path
        ]
        replayed = Replay()
        for seq in range(1, self.state.seq + 1):
            try:
                entry = self._decoded(seq, self.objects.get(self.path(seq)))
            except CorruptError as error:
                found.append((self.path(seq), str(error)))
                continue
            if not replayed.add(entry):
                found.append((self.path(seq), "written by a driver that had lost the run: it has no effect"))
        return found

    def path(self, seq: int) -> str:
        return f"{self.folder}/log/{seq:08d}.json"

    def seconds_held(self) -> float:
        """Return for how long the run is still held, as far as can be seen from here; 0 when nobody holds it."""
        lease = self.state.lease
        if lease is None:
            return 0.0
        return seconds_left(lease, self._heard(lease), time.time(), is_alive(holder_of(lease)) is False)

    def _await_free(self, deadline: float) -> None:
        """Return when nobody holds the run; LeaseHeldError once the holder gives a sign of life, or at the deadline."""
        first_heard = None
        while (lease := self.state.lease) is not None and (left_s := self.seconds_held()) > 0:
            heard = (lease.epoch, self._heard(lease))
            first_heard = first_heard or heard
            if is_alive(holder_of(lease)) or heard != first_heard or time.monotonic() >= deadline:
                raise LeaseHeldError(held_sentence(self.run, lease, heard[1], time.time(), left_s))
            time.sleep(min(left_s, _POLL_S))
            self.refresh()

    def _fenced(self) -> FencedError:
        lease = self.state.lease
        lost = "its lease was released" if lease is None else f"{holder_of(lease).describe()} took it over"
        return FencedError(
            f"this driver does not hold run {self.run!r} any more: {lost}, so its write was refused. "
            "What it committed before stays; start it again to take its turn"
        )

    def _create(self, entry: Entry) -> bool:
        data = encode_entry(entry)
        created = self.objects.put(self.path(entry.seq), data, create_only=True)
        # A service may have done the put and lost the answer; its client then retried and met its own object.
        if not created and self.objects.get(self.path(entry.seq)) != data:
            return False
        self.state = follow(self.state, entry)
        return True

    def _read(self, seq: int) -> Entry | None:
        data = self.objects.get(self.path(seq))
        if data is None:
            return None
        try:
            return self._decoded(seq, data)
        except CorruptError:
            if not self._salvage:
                raise
            self.damaged.append(self.path(seq))
            return _gap(seq)

    def _decoded(self, seq: int, data: bytes | None) -> Entry:
        if data is None:
            raise self._lost(seq, "is missing")
        try:
            entry = decode_entry(data, self.path(seq))
        except CorruptError as error:
            raise self._lost(seq, f"cannot be read ({error})") from error
        if entry.seq != seq:
            raise self._lost(seq, f"is a copy of entry {entry.seq}")
        return entry

    def _lost(self, seq: int, what: str) -> CorruptError:
        return CorruptError(
            f"{self.objects.uri}/{self.path(seq)} {what}, so run {self.run!r} is not opened: put that file back from a "
            f"copy (an export, a backup); without one, `diki-ray store compact --accept-loss --storage "
            f"{self.objects.uri} --run {self.run}` goes on without the entry"
        )

    def _listed_numbers(self) -> list[int]:
        names = [info.path.rpartition("/")[2] for info in self.objects.list(f"{self.folder}/log")]
        return [int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit()]

    def _newest_snapshot(self) -> State:
        for info in reversed(self.objects.list(f"{self.folder}/snapshots")):
            data = self.objects.get(info.path)
            try:
                if data is not None:
                    return decode_state(data, info.path)
            except CorruptError:  # the log is still whole: read more of it
                self.damaged.append(info.path)
        return State()

    def _heard(self, lease: Entry) -> float:
        data = self.objects.get(self._heartbeat(lease.epoch))
        try:
            return lease.time if data is None else renewed_at(unseal(data, "heartbeat"))
        except CorruptError:  # worth one interval: the next renewal replaces it
            return lease.time

    def _heartbeat(self, epoch: int) -> str:
        return f"{self.folder}/leases/{epoch:08d}.json"

    def _check_conditional_puts(self, entry: Entry) -> None:
        if self.objects.put(self.path(entry.seq), encode_entry(entry), create_only=True):
            raise StorageError(
                f"{self.objects.uri} overwrites objects that it was told to create only (If-None-Match is ignored), so "
                "two drivers could destroy each other's work: use a storage service with conditional puts"
            )

    def _yield_to_upkeep(self, lease: Entry) -> None:
        """A purge puts its lock, then looks for leases; we put our lease, then look for its lock: one of us sees."""
        if (data := self.objects.get(UPKEEP_LOCK)) is None:
            return
        lock = unseal(data, UPKEEP_LOCK)
        holder = Holder(**lock["holder"])
        if is_alive(holder) is not False and time.time() < lock["until"]:
            self.end_lease(lease.epoch)
            raise LeaseHeldError(
                f"{holder.describe()} is tidying {self.objects.uri}, no run may start meanwhile: try again in a minute"
            )


def _gap(seq: int) -> Entry:
    """Stands for an entry that is lost: of no epoch, so that it changes nothing."""
    return Entry(seq, "release", epoch=-1, time=0.0)
