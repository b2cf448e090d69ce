"""What people do to a store now and then: purge, verify, export, import. Slow is fine here, harm is not."""

import os
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diki_ray.errors import FencedError, LeaseHeldError, StorageError, UserError
from diki_ray.json_text import parsed
from diki_ray.regular_files import check_size, limit_of, open_regular
from diki_ray.store.checkpoints import Checkpoints
from diki_ray.store.library import Library, key_path, module_path, own_key
from diki_ray.store.log import Holder, holder_of, seal, unseal
from diki_ray.store.objects import LocalObjects, Objects, checked_path
from diki_ray.store.process import is_alive, this_process
from diki_ray.store.run_log import UPKEEP_LOCK, RunLog

_LOCK_TTL_S = 60.0  # how long a purge or import that died elsewhere keeps runs from starting
_LEFTOVER_AGE_S = 3600.0  # no write of ours takes an hour: an older temporary file has no writer any more
_BATCH = 100
_PAGE = "results/report.html"  # may hold scripts, and is made again from results.json
_TAKEN = re.compile(
    r"results/(results\.json|parts\.json|config\.yaml|failure\.json|report\.html)|(log|snapshots)/[0-9]+\.json"
    r"|imported\.json|checkpoints/[^/]+/[0-9]+(\.json|-[0-9a-f]+\.safetensors)"
)
"""Files of a run that an import knows; what else a folder or tar from elsewhere holds in it is refused."""


@dataclass(frozen=True)
class PurgeReport:
    """What a purge deleted, or would delete."""

    digests: tuple[str, ...]
    num_bytes: int
    num_keys: int
    leftover_bytes: int  # half-written files of killed processes
    dry_run: bool = False


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a run, and what to do about it."""

    path: str
    what: str


def purge(log: RunLog, library: Library, dry_run: bool) -> PurgeReport:
    """Delete what no run refers to: keys first, so that no key ever leads to a blob that is gone.

    A run refers to a blob by its log; a driver looks a key up first and writes its log entry later. So nothing may be
    between the two anywhere while we look: no other run may be held, and none can start until we are done.
    """
    objects = log.objects
    if dry_run:
        blobs, keys = _unreferenced(objects, log, library)
        return PurgeReport(tuple(blobs), sum(blobs.values()), len(keys), 0, dry_run)
    assert log.state.lease is not None
    with _upkeep_lock(objects, holder_of(log.state.lease)) as still_ours:
        _fence_other_runs(objects, log.run)
        blobs, keys = _unreferenced(objects, log, library)
        for paths in ([key_path(key) for key in keys], [module_path(digest) for digest in blobs]):
            for start in range(0, len(paths), _BATCH):
                still_ours()
                objects.delete(paths[start : start + _BATCH])
        leftover_bytes = objects.sweep(_LEFTOVER_AGE_S)
    return PurgeReport(tuple(blobs), sum(blobs.values()), len(keys), leftover_bytes)


def verify(log: RunLog, library: Library, checkpoints: Checkpoints) -> tuple[Problem, ...]:
    """Read everything a run consists of and name what is wrong."""
    found = [Problem(path, what) for path, what in log.problems()]
    for entry in log.state.modules:
        try:
            library.read(entry.digest)
        except StorageError as error:
            found.append(Problem(module_path(entry.digest), f"module of task {entry.task!r}: {error}"))
        if library.find(entry.key) is None and not log.objects.exists(imported_path(log)):
            what = f"key of task {entry.task!r} is gone or damaged: other runs train it again"
            found.append(Problem(key_path(entry.key), what))
    found += [Problem(checkpoints.folder, what) for what in checkpoints.problems()]
    for info in log.objects.list(f"{log.folder}/results"):
        if info.path.endswith(".json"):
            found += _document_problems(log.objects, info.path)
    return tuple(found)


def imported_path(log: RunLog) -> str:
    """Return where it says that a run was imported: no key leads to its modules, for whoever wrote them may have put
    anything under any key. They are the run's own, and no other run adopts them."""
    return f"{log.folder}/imported.json"


def export_run(log: RunLog, library: Library, path: str) -> int:
    """Copy a run out and return how many bytes it has. A tar appears whole or not at all."""
    if not path.endswith(".tar"):
        return _copy(log.objects, log.run, Objects.open(path), log.run)
    target = Path(path).absolute()
    if target.exists():
        raise UserError(f"{target} exists already: give another name or delete it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        num_bytes = _copy(log.objects, log.run, LocalObjects(str(folder / "run")), log.run)
        with tarfile.open(folder / "run.tar", "w") as archive:
            archive.add(folder / "run", arcname=".")
        os.replace(folder / "run.tar", target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return num_bytes


def import_run(objects: Objects, run: str, path: str) -> None:
    """Copy an exported run in, under the name `run`; without its page. UserError: a file that no run writes."""
    if not path.endswith(".tar"):
        _copy_in(Objects.open(path), objects, run, path)
        return
    with tempfile.TemporaryDirectory(prefix="diki-import-") as folder:
        _unpack(Path(path), folder)
        _copy_in(LocalObjects(folder), objects, run, path)


def _copy_in(source: Objects, target: Objects, run: str, path: str) -> None:
    source_run = _only_run(source, run, path)
    for info in source.list(f"runs/{source_run}"):
        name = info.path.removeprefix(f"runs/{source_run}/")
        if not _TAKEN.fullmatch(name):
            raise UserError(f"{path} is refused: no run writes {name!r}; delete it there if the rest is to be imported")
    _copy(source, source_run, target, run, without=_PAGE, with_keys=False)


def _unreferenced(objects: Objects, log: RunLog, library: Library) -> tuple[dict[str, int], list[str]]:
    """Return the bytes of each blob that no run refers to, and the keys that lead there. A damaged log stops it."""
    runs = objects.folders("runs")
    used = {entry.digest for run in runs for entry in RunLog(objects, run).state.modules}
    used |= {entry.digest for entry in log.state.modules}
    blobs = {_stem(info.path): info.num_bytes for info in objects.list("library/modules")}
    unused = {digest: num_bytes for digest, num_bytes in blobs.items() if digest not in used}
    records = [library.find(_stem(info.path)) for info in objects.list("library/keys")]
    return unused, [record.key for record in records if record is not None and record.digest not in used]


def _fence_other_runs(objects: Objects, own: str) -> None:
    for run in objects.folders("runs"):
        if run == own:
            continue
        other = RunLog(objects, run)
        lease = other.state.lease
        if lease is None:
            continue
        if other.seconds_held() > 0:
            raise LeaseHeldError(
                f"run {run!r} of this storage is held by {holder_of(lease).describe()}, which may be about to use a "
                "blob that nothing refers to yet: purge when it has ended"
            )
        # Its driver died, or sleeps: closing the lease makes sure that it can't wake up and refer to what is deleted.
        # A driver that takes the run just now finds our lock and steps back; to release its old lease is then an error.
        with suppress(FencedError):
            other.end_lease(lease.epoch)


@contextmanager
def _upkeep_lock(objects: Objects, holder: Holder) -> Iterator["_StillOurs"]:
    ours = _StillOurs(objects, holder)
    try:
        ours.take()
        yield ours
    finally:
        ours.give_back()


class _StillOurs:
    """The storage's upkeep lock; calling it extends it, or stops a purge that slept too long to be sure of anything."""

    def __init__(self, objects: Objects, holder: Holder) -> None:
        self._objects = objects
        self._holder = holder

    def take(self) -> None:
        if self._objects.put(UPKEEP_LOCK, self._content(), create_only=True):
            return
        lock = self._read()
        other = Holder(**lock["holder"]) if lock else None
        rival = other is not None and other.token != self._holder.token and is_alive(other) is not False
        if lock and other and rival and time.time() < lock["until"]:
            raise LeaseHeldError(f"{other.describe()} is tidying this storage already: try again in a minute")
        self._objects.put(UPKEEP_LOCK, self._content())

    def __call__(self) -> None:
        lock = self._read()
        if lock is None or lock["holder"]["token"] != self._holder.token or time.time() >= lock["until"]:
            raise StorageError("the work was interrupted for too long and has stopped; start it again")
        self._objects.put(UPKEEP_LOCK, self._content())

    def give_back(self) -> None:
        lock = self._read()
        if lock is not None and lock["holder"]["token"] == self._holder.token:
            self._objects.delete([UPKEEP_LOCK])

    def _content(self) -> bytes:
        return seal({"holder": vars(self._holder), "until": time.time() + _LOCK_TTL_S})

    def _read(self) -> dict[str, Any] | None:
        data = self._objects.get(UPKEEP_LOCK)
        return unseal(data, UPKEEP_LOCK) if data is not None else None


def _copy(
    source: Objects,
    source_run: str,
    target: Objects,
    target_run: str,
    without: str | None = None,
    with_keys: bool = True,
) -> int:
    """Copy blobs and keys, then the run's folders, its log last and in order: stopped anywhere, it is an earlier state.

    Under the upkeep lock of the target: a purge there would find blobs that no log refers to yet.
    """
    with _upkeep_lock(target, this_process()) as still_ours:
        return _copy_locked(source, source_run, target, target_run, still_ours, without, with_keys)


def _copy_locked(
    source: Objects,
    source_run: str,
    target: Objects,
    target_run: str,
    still_ours: "_StillOurs",
    without: str | None,
    with_keys: bool,
) -> int:
    log, there = RunLog(source, source_run), RunLog(target, target_run)
    if log.state.seq == 0:
        raise UserError(
            f"{source.uri} has no run {source_run!r}; it has: {', '.join(source.folders('runs')) or 'none'}"
        )
    if there.seconds_held() > 0 or there.state.seq > log.state.seq:
        raise UserError(f"{target.uri} has a run {target_run!r} already, held or further on: give another name")
    library, num_bytes = Library(target), 0
    for entry in log.state.modules:
        still_ours()
        blob = Library(source).read(entry.digest)
        if own_key(blob) not in (None, entry.key):
            raise UserError(
                f"the module of task {entry.task!r} is not the one that its key says: run {source_run!r} was put "
                "together by hand, and is not copied"
            )
        if with_keys:
            library.commit(entry.key, blob, entry.metadata)
        if not library.intact(entry.digest):
            # Of an import, or the target trained this key itself; the log needs its own blob.
            target.put(module_path(entry.digest), blob)
        num_bytes += len(blob)
    for part in ("results", "checkpoints", "snapshots", "log"):
        # A checkpoint's description comes after its blob ('-' sorts before '.').
        for info in source.list(f"runs/{source_run}/{part}"):
            name = info.path.removeprefix(f"runs/{source_run}/")
            if part == "log" and int(_stem(name)) > log.state.seq:
                continue  # appended since we began: its blob may not be among those copied
            if name == without:
                continue
            num_bytes += _copy_object(source, info.path, target, f"runs/{target_run}/{name}", part == "log")
    if not with_keys:
        target.put(imported_path(there), seal({"imported_at": time.time()}))
    if RunLog(target, target_run).state.modules != log.state.modules:
        raise StorageError(f"the copy of run {source_run!r} differs from the original: copy it again")
    return num_bytes


def _copy_object(source: Objects, path: str, target: Objects, target_path: str, is_log: bool) -> int:
    data = source.get(path)
    if data is None:
        return 0  # a checkpoint or snapshot that its run has just replaced
    if not target.put(target_path, data, create_only=is_log) and target.get(target_path) != data:
        raise UserError(f"{target.uri} has another run of that name ({target_path} differs): give another name")
    return len(data)


def _only_run(objects: Objects, run: str, path: str) -> str:
    runs = objects.folders("runs")
    if run in runs:
        return run
    if len(runs) != 1:
        raise UserError(f"{path} has no run {run!r}; it has: {', '.join(runs) or 'none'}")
    return runs[0]


def _unpack(archive: Path, folder: str) -> None:
    """Unpack regular files with plain relative names only: a tar may hold links, devices and '../'."""
    target = LocalObjects(folder)
    try:
        with open_regular(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                check_size(member.size, limit_of(member.name), member.name)
                stream = tar.extractfile(member) if member.isreg() else None
                if stream is None:
                    raise UserError(f"{archive}: {member.name!r} is no regular file, so this is no exported run")
                target.put(checked_path(member.name.removeprefix("./")), stream.read())
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{archive} can't be read as an exported run: {error}") from error


def _document_problems(objects: Objects, path: str) -> list[Problem]:
    try:
        if not isinstance(parsed(objects.get(path) or b""), dict):
            return [Problem(path, "no JSON object: run the job again, it writes it anew")]
    except (ValueError, StorageError) as error:
        return [Problem(path, f"no JSON ({error}): run the job again, it writes it anew")]
    return []


def _stem(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[0]
