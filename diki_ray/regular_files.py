"""Files of a disk that other people may have put there: regular files alone are opened, and read within a limit.

A pipe would be waited for for ever, a device read without an end, and a sparse file of gigabytes costs nothing to send.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MIB = 2**20
CONFIG_BYTES = MIB
"""A configuration of five thousand tasks has less."""
DOCUMENT_BYTES = 64 * MIB
"""JSON and HTML: a snapshot of sixty thousand tasks, the results of a stream of thousands."""
MANIFEST_BYTES = 256 * MIB
"""Lines of a few million images."""
IMAGE_BYTES = 256 * MIB
"""As many as the pixels have that are decoded at most (data/images.py), uncompressed."""
BLOB_BYTES = 4 * 2**30
"""Modules, checkpoints, cached arrays, ranges of shards. The largest module (rail with 15,000 features) has 1.8 GB."""

_DOCUMENTS = (".json", ".html", ".md", ".yaml", ".yml")
_IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")


def limit_of(name: str) -> int:
    """The bytes that are read at most of what has this name, by its ending."""
    ending = os.path.splitext(name)[1].lower()
    kinds = ((_DOCUMENTS, DOCUMENT_BYTES), (_IMAGES, IMAGE_BYTES))
    return next((limit for endings, limit in kinds if ending in endings), BLOB_BYTES)


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading, at once; the caller closes it.

    Raises:
        OSError: there is none, it cannot be read, or it is a folder, a pipe, a device or a socket.
    """
    # Without O_NONBLOCK opening a pipe waits for someone who writes into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    raise OSError(errno.EINVAL, "it is a pipe, a device or a socket, and regular files alone are read", str(path))


def read_regular(path: str | Path, start: int = 0, stop: int | None = None, limit: int | None = None) -> bytes:
    """Bytes [start, stop) of a regular file, or to its end without `stop`; a file that ends before gives fewer.

    limit: the bytes that may be read at once; by the name's ending if it is not given.

    Raises:
        OSError: as `open_regular`, or more bytes than the limit.
    """
    limit = limit_of(str(path)) if limit is None else limit
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        end = size if stop is None else min(stop, size)
        check_size(end - start, limit, path)
        stream.seek(start)
        return stream.read(max(0, end - start))


def check_size(num_bytes: int, limit: int, path: str | Path) -> None:
    """Raises OSError where there are more bytes than the limit."""
    if num_bytes > limit:
        raise OSError(errno.EFBIG, f"it has {num_bytes:,} bytes, and at most {limit:,} are read", str(path))
