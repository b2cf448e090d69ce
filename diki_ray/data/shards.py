"""Shards: WebDataset tars written byte for byte alike, and read without trusting them.

A sample is two members, `<key>.<image extension>` with the image's own bytes and `<key>.cls` with its label in ASCII.
Nothing else is ever decoded: webdataset's default decoders would unpickle `.pyd`, `.pkl` and `.pth` members, and its
`gopen` would run `pipe:` URLs; neither is called here. Members are read by `tarfile` and grouped by webdataset.
webdataset's own member loop is not used because it opens compressed archives and expands sparse members: a small
file could fill the memory.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any

from diki_ray.data.images import EXTENSIONS
from diki_ray.data.index import TAR_BLOCK_BYTES, Shard, Split
from diki_ray.errors import DataError, StorageError
from diki_ray.regular_files import open_regular
from diki_ray.store.files import join, read_bytes, scheme_of, write_bytes

os.environ["WDS_SECURE"] = "1"  # before webdataset is imported, which reads it once

DEFAULT_SHARD_BYTES = 32 * 2**20
"""Small enough to be held while written, large enough that object storage reads it at full speed."""

PICKLES = frozenset({"pyd", "pkl", "pickle", "pth", "pt", "npy", "npz"})
"""Members that webdataset's default decoders would hand to code that can run what the file says."""

MAX_MEMBER_BYTES = 256 * 2**20
"""No image file is larger; a member that says so is not read."""

MAX_KEY_LENGTH = 90
"""A plain tar header holds names of 100 bytes."""

NO_LABEL = -1
"""A sample whose label was not read has this one."""

_END_OF_ARCHIVE = bytes(2 * TAR_BLOCK_BYTES)
_KEY = re.compile(r"[\w-]+(/[\w-]+)*", re.ASCII)
_UNSAFE_NAME = re.compile(r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)|[\x00-\x1f\x7f\\]|^.{256}")


@dataclass(frozen=True)
class Sample:
    """One image as it lies in a shard: its key, its undecoded bytes, its file extension without dot, its label."""

    key: str
    image: bytes
    extension: str
    label: int


class BadSampleError(DataError):
    """A sample that is skipped; `reason` is one of few short phrases, fit for counting; `key` may be unknown ("")."""

    def __init__(self, reason: str, key: str = "", detail: str = "") -> None:
        super().__init__(f"{reason}: {key} {detail}".rstrip(": "))
        self.reason = reason
        self.key = key


class SkipLedger:
    """Counts skipped samples by reason, each sample once however often it is met; an error once over `budget`.

    Safe to share between threads. `budget` None counts without limit.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self._reasons: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        """Distinct samples skipped so far."""
        return len(self._reasons)

    @property
    def counts(self) -> dict[str, int]:
        """Distinct samples skipped so far, by reason."""
        with self._lock:
            return dict(Counter(self._reasons.values()))

    @property
    def skipped(self) -> list[tuple[str, str, str]]:
        """Shard, key and reason of every distinct sample, in the order they were met."""
        with self._lock:
            return [(shard, key, reason) for (shard, key), reason in self._reasons.items()]

    def skip(self, shard: str, key: str, reason: str) -> None:
        """Count one sample; DataError that names shard, key and the counts when that is one too many."""
        with self._lock:
            self._reasons.setdefault((shard, key), reason)
            over = self.budget is not None and len(self._reasons) > self.budget
        if over:
            raise DataError(
                f"{self.total} samples could not be used and the budget is {self.budget}; the last one is {key} in "
                f"{shard} ({reason}). By reason: {self.counts}. Prepare the data set again, or raise the budget"
            )


# --- writing --------------------------------------------------------------------------------------------------------


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)  # owner 0, no user name, time 0: the same data are the same bytes
    info.size = len(data)
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict") + data + bytes(-len(data) % TAR_BLOCK_BYTES)


def encode_sample(sample: Sample, num_classes: int) -> bytes:
    """The bytes of a sample's two tar members, a multiple of 512; DataError for what could not be read back."""
    if sample.extension not in EXTENSIONS:
        raise DataError(f"sample {sample.key!r}: .{sample.extension} is not an image; allowed: {sorted(EXTENSIONS)}")
    if not 0 <= sample.label < num_classes:
        raise DataError(f"sample {sample.key!r} has label {sample.label}, outside 0 … {num_classes - 1}")
    if not _KEY.fullmatch(sample.key) or len(sample.key) > MAX_KEY_LENGTH:
        raise DataError(
            f"{sample.key!r} cannot be a sample's key: up to {MAX_KEY_LENGTH} of letters, digits, _, - and inner /"
        )
    label = str(sample.label).encode()
    return _member(f"{sample.key}.{sample.extension}", sample.image) + _member(f"{sample.key}.cls", label)


def write_shard(folder: str, file: str, samples: Iterable[bytes]) -> Shard:
    """Write samples already encoded as one tar, whole or not at all; the same samples give the same bytes."""
    parts = list(samples)
    data = b"".join([*parts, _END_OF_ARCHIVE])
    write_bytes(join(folder, file), data)
    return Shard(
        file=file,
        num_samples=len(parts),
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        blocks=tuple(len(part) // TAR_BLOCK_BYTES for part in parts),
        crc32=tuple(zlib.crc32(part) for part in parts),
    )


def write_split(
    folder: str,
    split: str,
    samples: Iterable[Sample],
    num_classes: int,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Split:
    """Write `<split>-000000.tar`, … into `folder` (local or remote) in the given order; deterministic.

    A shard is closed before the sample that would take it over `max_shard_bytes`, so only a single larger sample can.
    Raises DataError for a key used twice, a label out of range or a member that is no image.
    """
    shards: list[Shard] = []
    pending: list[bytes] = []
    pending_bytes = 0
    per_class = [0] * num_classes
    keys: set[str] = set()

    def close_shard() -> None:
        shards.append(write_shard(folder, shard_file(split, len(shards)), pending))
        pending.clear()

    for sample in samples:
        if sample.key in keys:
            raise DataError(f"split {split!r}: two samples have the key {sample.key!r}")
        keys.add(sample.key)
        encoded = encode_sample(sample, num_classes)
        if pending and pending_bytes + len(encoded) > max_shard_bytes:
            close_shard()
            pending_bytes = 0
        pending.append(encoded)
        pending_bytes += len(encoded)
        per_class[sample.label] += 1
    if pending:
        close_shard()
    return Split(name=split, shards=tuple(shards), samples_per_class=tuple(per_class))


def shard_file(split: str, number: int) -> str:
    """The file name of a split's shard."""
    return f"{split}-{number:06d}.tar"


# --- reading --------------------------------------------------------------------------------------------------------


def _members(tar: IO[bytes], where: str, ledger: SkipLedger) -> Iterator[dict[str, Any]]:
    """The members of a tar that may be part of a sample, in the form webdataset's grouping takes."""
    # "r:" opens plain tars only.
    with tarfile.open(fileobj=tar, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
        for member in archive:
            extension = member.name.rpartition("/")[2].partition(".")[2].lower()
            if member.isdir():
                pass
            elif not member.isreg() or member.issparse():
                ledger.skip(where, repr(member.name), "not a regular file")
            elif _UNSAFE_NAME.search(member.name):
                ledger.skip(where, repr(member.name), "unsafe name")
            elif extension in PICKLES:
                ledger.skip(where, repr(member.name), "pickle, not read")
            elif member.size > MAX_MEMBER_BYTES:
                ledger.skip(where, repr(member.name), "member too large")
            elif extension == "cls" or extension in EXTENSIONS:
                file = archive.extractfile(member)
                assert file is not None  # a regular file always opens
                yield {"fname": member.name, "data": file.read(), "__url__": where}
            # tarfile keeps every header it has seen; a shard may have many
            archive.members = []  # type: ignore[attr-defined]
        # tarfile ends without a word at a header it cannot read, as if the archive ended there.
        tar.seek(archive.offset)
        end = tar.read(TAR_BLOCK_BYTES)
        if end.strip(b"\0"):
            raise tarfile.ReadError("damaged header")


def _to_sample(group: dict[str, Any], num_classes: int | None, labelled: bool = True) -> Sample:
    key = group["__key__"]
    images = [extension for extension in group if extension in EXTENSIONS]
    if labelled and "cls" not in group:
        raise BadSampleError("no label", key)
    if len(images) != 1:
        raise BadSampleError("no image" if not images else "more than one image", key)
    if not labelled:
        return Sample(key=key, image=group[images[0]], extension=images[0], label=NO_LABEL)
    text = group["cls"]
    if len(text) > 9 or not text.strip().isdigit():
        raise BadSampleError("label is not a number", key)
    label = int(text)
    if num_classes is not None and label >= num_classes:
        raise BadSampleError("label out of range", key, f"{label}, the data set has {num_classes} classes")
    return Sample(key=key, image=group[images[0]], extension=images[0], label=label)


def _grouped(members: Iterator[dict[str, Any]], **options: Any) -> Iterator[dict[str, Any]]:
    """What webdataset makes samples of. It imports torch, which a process that reads images for others does without."""
    from webdataset.tariterators import group_by_keys

    found: Iterator[dict[str, Any]] = group_by_keys(members, **options)
    return found


def read_shard(
    uri: str, *, num_classes: int | None = None, ledger: SkipLedger | None = None, labelled: bool = True
) -> Iterator[Sample]:
    """Every readable sample of any WebDataset tar, front to back, without an index; not `labelled`: labels are neither
    asked for nor read.

    Members that are neither images nor labels are passed over unread. What is damaged is counted in `ledger` (default:
    a budget of 0, so the first bad sample is an error); reading ends where the tar stops making sense.

    Raises DataError for a URL that is not a local path or one of REMOTE_SCHEMES, StorageError if it cannot be read.
    """
    ledger = SkipLedger(budget=0) if ledger is None else ledger

    def count(error: Exception) -> bool:
        name = str(error.args[0]).partition(":")[0] if error.args else "(unknown)"
        ledger.skip(uri, name, "duplicate name" if isinstance(error, ValueError) else "corrupt tar")
        return True

    with _open(uri) as tar:
        seen: set[str] = set()
        groups = _grouped(_until_damage(_members(tar, uri, ledger), uri, ledger), handler=count)
        for group in groups:
            try:
                sample = _to_sample(group, num_classes, labelled)
                if sample.key in seen:
                    raise BadSampleError("duplicate key", sample.key)
            except BadSampleError as error:
                ledger.skip(uri, error.key, error.reason)
                continue
            seen.add(sample.key)
            yield sample


def _open(uri: str) -> IO[bytes]:
    try:
        return io.BytesIO(read_bytes(uri)) if scheme_of(uri) else open_regular(uri)
    except OSError as error:
        raise StorageError(f"cannot read shard {uri}: {error}") from None


def _until_damage(members: Iterator[dict[str, Any]], where: str, ledger: SkipLedger) -> Iterator[dict[str, Any]]:
    try:
        yield from members
    except DataError:
        raise
    except Exception as error:  # tarfile's own errors, and ValueError, EOFError, OSError from mangled header fields
        ledger.skip(where, "(rest of the shard)", f"corrupt tar ({type(error).__name__})")


def read_encoded(uri: str, shard: Shard, first: int, last: int) -> list[bytes]:
    """The encoded bytes of samples [first, last) of a shard, by one range request.

    A shard that ends early gives short or empty parts at the end, which `decode_sample` refuses one by one.
    Raises StorageError if there is no such shard or it cannot be read.
    """
    ends = [0]
    for blocks in shard.blocks[first:last]:
        ends.append(ends[-1] + blocks * TAR_BLOCK_BYTES)
    offset = sum(shard.blocks[:first]) * TAR_BLOCK_BYTES
    try:
        data = read_bytes(uri, offset, offset + ends[-1])
    except FileNotFoundError:
        raise StorageError(f"shard {uri} is missing") from None
    return [data[start:stop] for start, stop in pairwise(ends)]


def decode_sample(encoded: bytes, shard: Shard, number: int, where: str, num_classes: int) -> Sample:
    """Sample `number` of a shard from its part of the tar; BadSampleError unless it is what was written.

    `where` names the shard in errors.
    """
    if len(encoded) < shard.blocks[number] * TAR_BLOCK_BYTES:
        raise BadSampleError("truncated shard")
    if zlib.crc32(encoded) != shard.crc32[number]:
        raise BadSampleError("corrupt tar")
    group = _as_written(encoded)
    if group is not None:
        return _to_sample(group, num_classes)
    try:
        groups = list(_grouped(_members(io.BytesIO(encoded), where, SkipLedger(budget=0))))
    except Exception as error:  # the checksum agrees, so whoever wrote index and shard wrote this on purpose
        raise BadSampleError("not a sample", detail=repr(error)) from None
    if len(groups) != 1:
        raise BadSampleError("not a sample", detail=f"{len(groups)} keys where the index has one")
    return _to_sample(groups[0], num_classes)


_BLANK_HEADER = _member("", b"")[:TAR_BLOCK_BYTES]


def _member_as_written(encoded: bytes, start: int) -> tuple[str, bytes, int] | None:
    """Name, content and end of the member at `start`, None unless its header is, byte for byte, one of `_member`."""
    header = encoded[start : start + TAR_BLOCK_BYTES]
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    fixed = (slice(100, 124), slice(135, 148), slice(156, None))  # all but name, size and checksum
    if header[148:156] != b"%06o\0 " % checksum or any(header[part] != _BLANK_HEADER[part] for part in fixed):
        return None
    try:
        name, size = header[:100].rstrip(b"\0").decode("ascii"), int(header[124:135], 8)
    except ValueError:
        return None
    content = start + TAR_BLOCK_BYTES
    end = content + -(-size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
    return (name, encoded[content : content + size], end) if size >= 0 and end <= len(encoded) else None


def _as_written(encoded: bytes) -> dict[str, Any] | None:
    """What webdataset's grouping finds in a sample that lies as `encode_sample` lays it, None for any other layout.

    Opening each sample as an archive of its own took a fifth of the time that decoding a small image takes.
    """
    if (image := _member_as_written(encoded, 0)) is None or (label := _member_as_written(encoded, image[2])) is None:
        return None
    key, _, extension = image[0].partition(".")
    as_laid = extension in EXTENSIONS and _KEY.fullmatch(key) and label[0] == f"{key}.cls" and label[2] == len(encoded)
    return {"__key__": key, extension: image[1], "cls": label[1]} if as_laid else None
