"""Which process this is, and whether the one that holds a run still lives (as far as this machine can see)."""

import getpass
import os
import socket
import uuid
from pathlib import Path

from diki_ray.store.log import Holder


def this_process(job: str = "") -> Holder:
    """Return this process as the holder of a run. Every call draws a new token, so call it once per driver."""
    pid = os.getpid()
    return Holder(
        host=socket.gethostname(),
        machine=_machine(),
        pid=pid,
        started=_started(pid) or "",
        user=_user(),
        job=job,
        token=uuid.uuid4().hex,
    )


def is_alive(holder: Holder) -> bool | None:
    """Tell whether the holder's process lives; None when it runs (or ran) where this machine can't see it."""
    if holder.machine != _machine():
        return None
    started = _started(holder.pid)
    return started is not None and started == holder.started


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no /proc: then only the name is left, and a process is looked up by its number
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """Return the kernel's start time of a process, None when it is gone (or only its unreaped remains are left)."""
    try:
        # The second field is the command in brackets and may hold blanks and brackets itself.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if Path("/proc/self").exists() else _signalled(pid)
    return None if fields[0] in "ZX" else fields[19]


def _signalled(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it exists and belongs to someone else
    return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user id has no name
        return f"uid {os.getuid()}"
