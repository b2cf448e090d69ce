"""Objects on a disk or in a bucket, behind a few verbs: with disk.py the only place that knows where bytes lie.

`put` is atomic and durable when it returns, and `put(create_only=True)` is the one primitive that every promise of the
store rests on: of any number of writers, on any number of machines, exactly one creates an object.

Buckets (s3://, gs://, az://) go through obstore, whose conditional put does that. A local path does not: obstore's
`LocalStore` links its temporary file into place without an fsync, so an acknowledged write could vanish, or be empty,
after a power loss. disk.py says how a file is written here.
"""

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError

from diki_ray.errors import UserError
from diki_ray.regular_files import check_size, limit_of
from diki_ray.store import disk
from diki_ray.store.bucket import open_bucket
from diki_ray.store.storage_errors import explained


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing says about one object. `modified` is in seconds since 1970, by the storage's clock."""

    path: str
    num_bytes: int
    modified: float


class Writer:
    """Takes the bytes of an object as they come; an error names the object."""

    def __init__(self, stream: Any, where: Path | str) -> None:
        self._stream = stream
        self._where = where

    def write(self, data: bytes) -> None:
        """Append bytes; StorageError or DiskFullError when they cannot be written."""
        with explained(self._where, "write"):
            self._stream.write(data)


class Objects(ABC):
    """Named bytes under one root, by relative path with `/`. A missing object is None, any failure a StorageError."""

    uri: str

    @staticmethod
    def open(uri: str, **options: Any) -> "Objects":
        """Return the objects under a local path (plain or file://) or a bucket URL; `options` are obstore's."""
        scheme, separator, rest = uri.partition("://")
        if not separator:
            return LocalObjects(uri)
        if scheme == "file":
            return LocalObjects("/" + rest.lstrip("/"))
        return BucketObjects(uri, **options)

    @abstractmethod
    def get(self, path: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """Return bytes [start, stop) of an object, or to its end without `stop`; None when there is no such object.

        An object that ends before `stop` gives fewer bytes.
        """

    @abstractmethod
    def put(self, path: str, data: bytes, create_only: bool = False) -> bool:
        """Write atomically; durable when it returns.

        With `create_only` an existing object is left as it is and False is returned. After an error the object is the
        old one, whole, or the new one, whole: a caller who must know reads it back.
        """

    @abstractmethod
    def open_writer(self, path: str) -> AbstractContextManager[Writer]:
        """Open an object to be written as its bytes come.

        It exists, whole and durable, once the block has ended without an error; after an error it does not.
        """

    @abstractmethod
    def list(self, prefix: str) -> tuple[ObjectInfo, ...]:
        """Return all objects below the folder `prefix`, at any depth, sorted by path; none without such a folder."""

    @abstractmethod
    def delete(self, paths: Iterable[str]) -> None:
        """Delete objects; one that is already gone is no error."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Tell whether there is such an object."""

    @abstractmethod
    def folders(self, prefix: str) -> tuple[str, ...]:
        """Return the names of the folders directly below `prefix` ("": the root), sorted."""

    def settle(self, folder: str) -> None:
        """Make what is visible in a folder durable, should its writer have been killed before it could say so."""
        return None

    def sweep(self, older_than_s: float) -> int:
        """Delete what killed writers left half written and no listing shows; return how many bytes that freed."""
        return 0


class LocalObjects(Objects):
    """A folder of a local or shared POSIX file system with hard links."""

    def __init__(self, root: str) -> None:
        self._root = Path(root).expanduser().absolute()
        self.uri = str(self._root)
        self._settled: set[Path] = set()

    def get(self, path: str, start: int = 0, stop: int | None = None) -> bytes | None:
        file = self._file(path)
        with explained(file, "read"):
            return disk.read(file, start, stop)

    def put(self, path: str, data: bytes, create_only: bool = False) -> bool:
        file = self._file(path)
        with explained(file, "write"):
            self._make_folder(file.parent)
            return disk.write(file, data, create_only)

    @contextlib.contextmanager
    def open_writer(self, path: str) -> Iterator[Writer]:
        file = self._file(path)
        with explained(file, "write"):
            self._make_folder(file.parent)
            unfinished = disk.Unfinished(file)
        try:
            yield Writer(unfinished.stream, file)
            with explained(file, "write"):
                unfinished.finish()
        finally:
            unfinished.discard()

    def list(self, prefix: str) -> tuple[ObjectInfo, ...]:
        return tuple(sorted(self._walk(prefix, temporary=False), key=lambda info: info.path))

    def delete(self, paths: Iterable[str]) -> None:
        folders = set()
        for path in paths:
            file = self._file(path)
            with explained(file, "delete"):
                file.unlink(missing_ok=True)
            folders.add(file.parent)
        for folder in folders:
            with explained(folder, "delete in"), contextlib.suppress(FileNotFoundError):
                disk.sync_folder(folder)

    def exists(self, path: str) -> bool:
        file = self._file(path)
        with explained(file, "read"):
            return file.is_file()

    def folders(self, prefix: str) -> tuple[str, ...]:
        folder = self._file(prefix) if prefix else self._root
        with explained(folder, "list"):
            try:
                return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
            except FileNotFoundError:
                return ()

    def settle(self, folder: str) -> None:
        path = self._file(folder)
        with explained(path, "write"):
            disk.sync_folder(path)

    def sweep(self, older_than_s: float) -> int:
        old = [i for i in self._walk("", temporary=True) if i.modified < time.time() - older_than_s]
        self.delete(info.path for info in old)
        return sum(info.num_bytes for info in old)

    def _file(self, path: str) -> Path:
        return self._root / checked_path(path)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder whose own entry is durable, or a power loss takes it with every acknowledged file in it.

        One that is there already may come from a process killed before it could sync it: the first write of this
        process into each folder makes sure.
        """
        if folder in self._settled and folder.is_dir():
            return
        if folder == self._root:
            if folder.is_dir():
                return
            folder.mkdir(parents=True, exist_ok=True)
        else:
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
        disk.sync_folder(folder.parent)
        self._settled.add(folder)

    def _walk(self, prefix: str, temporary: bool) -> Iterator[ObjectInfo]:
        top = self._file(prefix) if prefix else self._root
        with explained(top, "list"):
            for folder, _, names in os.walk(top):
                for name in names:
                    if disk.is_temporary(name) != temporary:
                        continue
                    file = Path(folder, name)
                    try:
                        status = file.stat()
                    except FileNotFoundError:  # deleted since it was listed
                        continue
                    yield ObjectInfo(file.relative_to(self._root).as_posix(), status.st_size, status.st_mtime)


class BucketObjects(Objects):
    """A bucket, or a prefix of one, whose service honours conditional puts (S3, GCS, Azure, MinIO, R2)."""

    def __init__(self, uri: str, store: Any = None, **options: Any) -> None:
        self.uri = uri.rstrip("/")
        self._store = open_bucket(self.uri, **options) if store is None else store

    def get(self, path: str, start: int = 0, stop: int | None = None) -> bytes | None:
        checked = checked_path(path)
        with explained(self._name(path), "read"):
            try:
                if start == 0 and stop is None:
                    found = obstore.get(self._store, checked)
                    check_size(found.meta["size"], limit_of(path), path)
                    return bytes(found.bytes())
                end = obstore.head(self._store, checked)["size"] if stop is None else stop
                check_size(end - start, limit_of(path), path)
                return bytes(obstore.get_range(self._store, checked, start=start, end=end)) if end > start else b""
            except FileNotFoundError:
                return None

    def put(self, path: str, data: bytes, create_only: bool = False) -> bool:
        with explained(self._name(path), "write"):
            try:
                obstore.put(self._store, checked_path(path), data, mode="create" if create_only else "overwrite")
            except (AlreadyExistsError, PreconditionError):
                return False
            return True

    @contextlib.contextmanager
    def open_writer(self, path: str) -> Iterator[Writer]:
        checked, name = checked_path(path), self._name(path)
        with explained(name, "write"):
            stream: Any = obstore.open_writer(self._store, checked)
        yield Writer(stream, name)
        with explained(name, "write"):
            stream.close()  # only now the object exists

    def list(self, prefix: str) -> tuple[ObjectInfo, ...]:
        with explained(self._name(prefix), "list"):
            found = [
                ObjectInfo(item["path"], item["size"], item["last_modified"].timestamp())
                for page in obstore.list(self._store, checked_path(prefix) if prefix else None)
                for item in page
            ]
        return tuple(sorted(found, key=lambda info: info.path))

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            with explained(self._name(path), "delete"), contextlib.suppress(FileNotFoundError):
                obstore.delete(self._store, checked_path(path))

    def exists(self, path: str) -> bool:
        with explained(self._name(path), "read"):
            try:
                obstore.head(self._store, checked_path(path))
            except FileNotFoundError:
                return False
            return True

    def folders(self, prefix: str) -> tuple[str, ...]:
        with explained(self._name(prefix), "list"):
            listed = obstore.list_with_delimiter(self._store, checked_path(prefix) if prefix else None)
        found = listed["common_prefixes"]
        return tuple(sorted(name.rstrip("/").rpartition("/")[2] for name in found))

    def _name(self, path: str) -> str:
        return f"{self.uri}/{path}"


def checked_path(path: str) -> str:
    """Return the path itself when it stays below the root, else raise UserError: people and tar files give names."""
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"{path!r} is no object name: use relative names without empty, '.' or '..' parts")
    return path
