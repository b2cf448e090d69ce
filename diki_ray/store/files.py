"""Files wherever they lie, by one name: a local path or a URL of object storage, as configurations and people give it.

This is how data sets, outputs and reports are read and written; what a run keeps goes through `Objects` (objects.py),
which these functions use as well. Only the places named in `scheme_of` are opened.
"""

import os
import re
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from diki_ray.errors import DataError, UserError
from diki_ray.store import disk
from diki_ray.store.objects import BucketObjects, LocalObjects, Objects, Writer, checked_path
from diki_ray.store.storage_errors import explained

REMOTE_SCHEMES = ("s3", "gs", "az", "http", "https")
"""Where data may lie beside a local path. A `pipe:` URL, which webdataset would hand to a shell, is not among them."""
# Nobody above a worker that reads data would try again, as the store's client does: three minutes, as obstore has it.
_PATIENCE: dict[str, Any] = {"retry_config": {"max_retries": 10, "retry_timeout": timedelta(seconds=180)}}


def scheme_of(uri: str) -> str:
    """Return "" for a local path, else one of REMOTE_SCHEMES; DataError for any other (`pipe:`, `file:`, …)."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", uri)
    if match is None:
        return ""
    scheme = match.group(1).lower()
    if scheme not in REMOTE_SCHEMES or not uri[match.end() :].startswith("//"):
        allowed = ", ".join(f"{s}://" for s in REMOTE_SCHEMES)
        raise DataError(f"{uri!r}: data are read from local paths, {allowed}; nothing else is opened")
    return scheme


def join(folder: str, file: str) -> str:
    """Return the name of `file` in `folder`, local or remote."""
    return f"{folder.rstrip('/')}/{file}"


def read_bytes(uri: str, start: int = 0, stop: int | None = None) -> bytes:
    """Return bytes [start, stop) of a file, or to its end without `stop`; a shorter file gives fewer bytes.

    Raises FileNotFoundError if there is none, StorageError naming it if it cannot be read.
    """
    if scheme_of(uri):
        objects, name = _located(uri)
        data = objects.get(name, start, stop)
    else:
        with explained(uri, "read"):
            data = disk.read(Path(uri), start, stop)
    if data is None:
        raise FileNotFoundError(f"there is no file {uri}")
    return data


def list_files(folder: str) -> list[str]:
    """Return the names of everything below a folder, relative to it and sorted; StorageError if it cannot be listed."""
    return [info.path for info in _folder(folder).list("")]


def folders(uri: str) -> tuple[str, ...]:
    """Return the names of the folders directly in a folder, sorted; none where there is no such folder.

    StorageError if it cannot be listed.
    """
    return _folder(uri).folders("")


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole or not at all; durable when it returns. StorageError if it cannot be written."""
    objects, name = _located(uri)
    objects.put(name, data)


def open_writer(uri: str) -> AbstractContextManager[Writer]:
    """Open a file to be written as its bytes come; it exists, whole, once the block has ended without an error."""
    objects, name = _located(uri)
    return objects.open_writer(name)


def delete(uri: str) -> None:
    """Delete a file; one that is not there is no error."""
    objects, name = _located(uri)
    objects.delete([name])


def _located(uri: str) -> tuple[Objects, str]:
    """Return the folder in which a file lies, and the file's name there."""
    folder, separator, name = uri.rpartition("/")
    objects = _folder(folder or separator or ".")
    try:
        return objects, checked_path(name)
    except UserError as error:
        raise DataError(f"{uri!r} names no file: {error}") from None


def _folder(uri: str) -> Objects:
    return _remote_folder(uri.rstrip("/")) if scheme_of(uri) else LocalObjects(os.path.abspath(uri))


@lru_cache(maxsize=64)
def _remote_folder(uri: str) -> Objects:
    return BucketObjects(uri, **_PATIENCE)
