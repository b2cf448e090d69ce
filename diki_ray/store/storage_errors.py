"""What disks and services raise, as errors that name the path and say what to do."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from obstore.exceptions import BaseError

from diki_ray.errors import DiskFullError, StorageError


@contextlib.contextmanager
def explained(where: Path | str, action: str) -> Iterator[None]:
    """Turn any error of a disk or a storage service into a StorageError that says what could not be done, and where."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"cannot {action} {where}: no space left ({_free_bytes(where):,} bytes free there); free some "
                "space and run the same command again, everything committed so far is intact"
            ) from error
        raise StorageError(f"cannot {action} {where}: {error.strerror or brief(error)}") from error
    except (BaseError, ValueError) as error:  # obstore raises its own, and ValueError for names that no service takes
        raise StorageError(f"cannot {action} {where}: {brief(error)}") from error


def brief(error: Exception) -> str:
    """Return the error's message without the dump of internals that obstore puts behind it."""
    return str(error).partition("\n\nDebug source")[0].strip()


def _free_bytes(where: Path | str) -> int:
    folder = Path(where)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
