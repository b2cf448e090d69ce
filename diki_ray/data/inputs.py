"""What people name to be answered (files, folders, globs, shards, prepared data sets), cut into parts that a process
anywhere can read. Every input becomes one row, readable or not: nothing is lost on the way.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pydantic import TypeAdapter

from diki_ray.data.images import EXTENSIONS
from diki_ray.data.index import INDEX_FILE, DatasetIndex, Shard
from diki_ray.data.shards import BadSampleError, SkipLedger, decode_sample, read_encoded, read_shard
from diki_ray.data.sources.folders import image_files
from diki_ray.errors import DataError, StorageError
from diki_ray.store.files import join, list_files, read_bytes, scheme_of

FILES_PER_PART = 64
_READ_THREADS = 8  # of a part: files in object storage are waited for, not worked on


@dataclass(frozen=True)
class Row:
    """One input: its name, and its undecoded bytes or why there are none."""

    image: str
    data: bytes | None
    error: str | None = None


@dataclass(frozen=True)
class Files:
    """Image files; those with a relative path are in `folder`."""

    paths: tuple[str, ...]
    folder: str

    @property
    def num_images(self) -> int:
        return len(self.paths)

    def read(self) -> Iterator[Row]:
        if not any(map(scheme_of, self.paths)):  # a file on a disk is read faster than it is handed to a thread
            yield from map(self._row, self.paths)
            return
        with ThreadPoolExecutor(_READ_THREADS) as threads:
            yield from threads.map(self._row, self.paths)

    def _row(self, path: str) -> Row:
        try:
            return Row(path, read_bytes(path if scheme_of(path) else os.path.join(self.folder, path)))
        except FileNotFoundError:
            return Row(path, None, "no such file")
        except (DataError, StorageError) as error:
            return Row(path, None, str(error))


@dataclass(frozen=True)
class PreparedShard:
    """A shard of a prepared data set: every sample that its index lists, damaged ones too."""

    name: str
    """What its rows are called by, with # and the sample's key (its number, where the key cannot be read)."""
    uri: str
    shard: Shard
    num_classes: int

    @property
    def num_images(self) -> int:
        return self.shard.num_samples

    def read(self) -> Iterator[Row]:
        try:
            encoded: Sequence[bytes] = read_encoded(self.uri, self.shard, 0, self.num_images)
        except StorageError as error:
            yield from (Row(f"{self.name}#{number}", None, str(error)) for number in range(self.num_images))
            return
        for number, part in enumerate(encoded):
            try:
                sample = decode_sample(part, self.shard, number, self.name, self.num_classes)
            except BadSampleError as error:
                yield Row(f"{self.name}#{number}", None, error.reason)
            else:
                yield Row(f"{self.name}#{sample.key}", sample.image)


@dataclass(frozen=True)
class Tar:
    """Any WebDataset tar, labelled or not. How many images it has is known when it is read."""

    name: str
    uri: str
    num_images = None

    def read(self) -> Iterator[Row]:
        ledger = SkipLedger()
        try:
            for sample in read_shard(self.uri, ledger=ledger, labelled=False):
                yield Row(f"{self.name}#{sample.key}", sample.image)
        except (DataError, StorageError, FileNotFoundError) as error:
            yield Row(self.name, None, str(error))
        for _, key, reason in ledger.skipped:
            yield Row(f"{self.name}#{key}", None, reason)


InputPart = Files | PreparedShard | Tar
_AS_JSON: TypeAdapter[InputPart] = TypeAdapter(InputPart)


def to_json(part: InputPart) -> bytes:
    """How a part travels to the process that reads it."""
    return _AS_JSON.dump_json(part)


def from_json(data: bytes) -> InputPart:
    return _AS_JSON.validate_json(data)


def parts_of(places: Iterable[str]) -> list[InputPart]:
    """The parts of what is named, in its order; files within a folder or a glob sorted.

    Raises:
        DataError: a folder or a glob without an image, a damaged index. StorageError: a place that cannot be listed.
    """
    found = (file_or_part for place in places for file_or_part in _inside(place))
    parts: list[InputPart] = []
    for is_file, run in groupby(found, key=lambda each: isinstance(each, str)):
        if is_file:
            paths = [str(path) for path in run]
            starts = range(0, len(paths), FILES_PER_PART)
            parts += [Files(tuple(paths[n : n + FILES_PER_PART]), os.getcwd()) for n in starts]
        else:
            parts += [part for part in run if not isinstance(part, str)]
    return parts


def is_collection(place: str) -> bool:
    """Whether it names more than one image file: a folder, a glob, a tar."""
    if _extension(place) == "tar":
        return True
    if scheme := scheme_of(place):
        return not scheme.startswith("http") and _extension(place) not in EXTENSIONS
    return os.path.isdir(os.path.expanduser(place)) or _is_glob(place)


def _inside(place: str) -> Iterable[str | InputPart]:
    """The files, or the parts, that a place stands for."""
    remote = scheme_of(place)
    local = os.path.expanduser(place)
    if not remote and _is_glob(place):
        matches = sorted(path for path in glob.glob(local, recursive=True) if _is_input(path))
        if not matches:
            raise DataError(f"{place} matches no image, tar or folder.")
        return [each for match in matches for each in _inside(match)]
    if _extension(place) == "tar":
        return [Tar(place, place if remote else os.path.abspath(local))]
    if not is_collection(place):
        return [place if remote else local]
    return _in_folder(place if remote else local)


def _in_folder(folder: str) -> Iterable[str | InputPart]:
    if scheme_of(folder):
        names = list_files(folder)
        images = sorted(name for name in names if _extension(name) in EXTENSIONS)
    else:
        names = [INDEX_FILE] if Path(folder, INDEX_FILE).is_file() else []
        images = [] if names else image_files(Path(folder))[0]
    if INDEX_FILE in names:
        index = DatasetIndex.load(folder)
        return [_prepared(index, shard) for split in index.splits.values() for shard in split.shards]
    if not images:
        raise DataError(f"{folder} has no image in it, and no {INDEX_FILE} of a prepared data set.")
    return [join(folder, image) for image in images]


def _prepared(index: DatasetIndex, shard: Shard) -> PreparedShard:
    name = index.shard_uri(shard)
    uri = name if scheme_of(name) else os.path.abspath(name)
    return PreparedShard(name, uri, shard, len(index.class_names))


def _is_glob(place: str) -> bool:
    return glob.has_magic(place) and not os.path.exists(os.path.expanduser(place))


def _is_input(path: str) -> bool:
    return os.path.isdir(path) or _extension(path) in EXTENSIONS | {"tar"}


def _extension(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[2].lower() if "." in path.rpartition("/")[2] else ""
