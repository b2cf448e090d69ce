"""Files of a local or shared POSIX file system: read in part, and written whole and safely or not at all.

A file is written and synced under another name, then linked (create) or renamed (replace), and then its folder is
synced: two fsyncs a write, against a few writes a task. Without the first a file that has its name could be empty after
a power loss, without the second it could be gone.
"""

import contextlib
import errno
import os
import uuid
from pathlib import Path
from typing import IO

from diki_ray.errors import StorageError
from diki_ray.regular_files import read_regular

_TEMPORARY = ".tmp"
# Signs of a file system without hard links (some FUSE mounts of buckets): there is no atomic create on it.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}


def read(file: Path, start: int = 0, stop: int | None = None) -> bytes | None:
    """Return bytes [start, stop) of a file, or to its end without `stop`; None when there is no such file.

    A file that ends before `stop` gives fewer bytes. OSError: no regular file, or more bytes than its kind may have.
    """
    try:
        return read_regular(file, start, stop)
    except (FileNotFoundError, NotADirectoryError):
        return None


def write(file: Path, data: bytes, create_only: bool = False) -> bool:
    """Write a file whole; durable when it returns. With `create_only` a file that is there stays, and False returns."""
    if create_only and file.exists():
        # Whoever linked it may have died before this: only now may a caller treat it as acknowledged.
        sync_folder(file.parent)
        return False
    unfinished = Unfinished(file)
    try:
        unfinished.stream.write(data)
        return unfinished.finish(create_only)
    finally:
        unfinished.discard()


class Unfinished:
    """A file that is being written to `stream`, under a temporary name beside the one that it will have."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}{_TEMPORARY}")
        self.stream: IO[bytes] = open(self._temporary, "xb")  # noqa: SIM115 (closed by finish or discard)

    def finish(self, create_only: bool = False) -> bool:
        """Give the file its name, with its bytes safe before and the name after; False if another has it already."""
        with self.stream:
            self.stream.flush()
            os.fsync(self.stream.fileno())
        named = _link(self._temporary, self._file) if create_only else _replace(self._temporary, self._file)
        sync_folder(self._file.parent)
        return named

    def discard(self) -> None:
        """Delete what has only the temporary name; nothing is left to delete of a file that was replaced."""
        self._temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # closing may try once more to write what a full disk has refused
            self.stream.close()


def is_temporary(name: str) -> bool:
    """Tell whether a file of that name is one that is being written, or that a killed writer left."""
    return name.startswith(".") and name.endswith(_TEMPORARY)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(temporary: Path, file: Path) -> bool:
    try:
        os.link(temporary, file)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise StorageError(
                f"the file system of {file.parent} has no hard links, so two drivers could overwrite each other: "
                "use a local disk or NFS, or give the bucket itself (s3://, gs://, az://) instead of a mount of it"
            ) from error
        raise
    return True


def _replace(temporary: Path, file: Path) -> bool:
    os.replace(temporary, file)
    return True
