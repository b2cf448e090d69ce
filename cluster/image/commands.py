"""Commands and requests of the trial of the image, and where its results lie."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "build" / "image"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def run(*words: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command's result as text. With `check` a failure ends this process with what the command said."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if check and done.returncode != 0:
        sys.exit(f"{' '.join(words)[:300]}\nexit code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done


def ulimits() -> list[str]:
    """Podman's own defaults may be more than this machine lets a process have."""
    files, processes = (resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    limits = {"nofile": min(files, 65536), "nproc": min(processes, 32768)}
    return [f"--ulimit={name}={limit}:{limit}" for name, limit in limits.items()]


def ask(
    url: str, body: bytes | None = None, headers: dict[str, str] | None = None, method: str = "", timeout: float = 10
) -> tuple[int, bytes]:
    """(status, body) of a request; the status is 0 where there was no answer."""
    request = urllib.request.Request(url, body, headers or {}, method=method or None)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""
