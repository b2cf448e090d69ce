"""A real local head that asks for a token, and `ray job submit` to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from job_runs import session_processes

ROOT = Path(__file__).parent.parent.parent
RAY = str(Path(sys.executable).parent / "ray")
PORTS = {
    "--port": 26379,
    "--dashboard-port": 28265,
    "--dashboard-agent-listen-port": 28366,
    "--metrics-export-port": 28081,
    "--ray-client-server-port": 20002,
}
"""Outside the range of the workers' own ports (10002 to 19999)."""


@dataclass(frozen=True)
class Head:
    environment: dict[str, str]

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [RAY, *arguments], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=280
        )

    def submit(self, submission_id: str, *command: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """A script with its arguments, in a copy of this repository on the cluster."""
        return self.ray(
            *("job", "submit", "--working-dir", ".", "--submission-id", submission_id),
            *([] if wait else ["--no-wait"]),
            *("--", "python", *command),
        )

    def logs(self, submission_id: str) -> str:
        return self.ray("job", "logs", submission_id).stdout


def token_environment(folder: Path) -> dict[str, str]:
    """What a process needs to join, or to ask, a cluster whose token lies in `folder`."""
    (folder / "token").write_text("a-token-of-this-test-alone-0123456789abcdef")
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@contextmanager
def running_head(
    folder: Path, environment: dict[str, str], *options: str, ports: dict[str, int] = PORTS
) -> Iterator[Head]:
    """A head of `ray start`, ended by its own process id."""
    short = Path("/tmp") / f"diki-{os.getpid()}"  # the paths of Ray's sockets must stay below 107 characters
    command = [RAY, "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={short}", *options]
    command += [f"{name}={port}" for name, port in ports.items()]
    with started(command, folder, environment, short) as process:
        head = Head(environment | {"RAY_ADDRESS": f"http://127.0.0.1:{ports['--dashboard-port']}"})
        wait_until(lambda: head.ray("job", "list").returncode == 0, "the head to answer", process)
        yield head


@contextmanager
def started(
    command: list[str], folder: Path, environment: dict[str, str], session: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """`ray start --block` and what it started, until it is left; `session` is its temporary folder."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **quiet)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        for pid in session_processes(process.pid):  # a head that is left alone takes half a minute
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(60)
        shutil.rmtree(session, ignore_errors=True)


def wait_until(is_so: Callable[[], bool], what: str, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 200
    while not is_so():
        assert process is None or process.poll() is None, f"it ended while the test waited for {what}"
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(1)
