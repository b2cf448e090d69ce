"""`ray job submit` to a real local head that asks for a token: results, the same id twice, stop and submit again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
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

    def ray(self, *arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        ray = str(Path(sys.executable).parent / "ray")
        return subprocess.run(
            [ray, *arguments], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout
        )

    def submit(
        self, submission_id: str, storage: Path | str, *overrides: str, wait: bool = True, data: Path | str = ""
    ) -> subprocess.CompletedProcess:
        return self.ray(
            *("job", "submit", "--working-dir", ".", "--submission-id", submission_id),
            *([] if wait else ["--no-wait"]),
            *("--", "python", "jobs/continual.py", "--config", "configs/debug.yaml"),
            *(f"run.storage={storage}", f"data.root={data or storage}/prepared", *overrides),
        )

    def status(self, submission_id: str) -> str:
        done = self.ray("job", "status", submission_id)
        return done.stdout + done.stderr


def token_environment(folder: Path) -> dict[str, str]:
    """What a process needs to join, or to ask, a cluster whose token lies in `folder`."""
    (folder / "token").write_text("a-token-of-this-test-alone-0123456789abcdef")
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@contextmanager
def running_head(
    folder: Path, environment: dict[str, str], *options: str, ports: dict[str, int] = PORTS
) -> Iterator[Head]:
    """A head of `ray start`, ended by its own process id."""
    ray = str(Path(sys.executable).parent / "ray")
    short = Path("/tmp") / f"diki-{os.getpid()}"  # the paths of Ray's sockets must stay below 107 characters
    command = [ray, "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={short}", *options]
    process = subprocess.Popen(
        [*command, *(f"{name}={port}" for name, port in ports.items())],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    head = Head(environment | {"RAY_ADDRESS": f"http://127.0.0.1:{ports['--dashboard-port']}"})
    deadline = time.monotonic() + 120
    try:
        while head.ray("job", "list").returncode != 0:
            assert process.poll() is None, "the head ended"
            assert time.monotonic() < deadline, "the head did not answer"
            time.sleep(1)
        yield head
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    with running_head(folder, token_environment(folder), "--num-cpus=2") as head:
        yield head


@pytest.mark.timeout(600)
def test_submitted_stopped_and_submitted_again(head: Head, tmp_path: Path) -> None:
    slow = ("train.epochs=60", "train.checkpoint_every_steps=5")  # long enough to be stopped in the middle
    assert head.submit("first", tmp_path, *slow, wait=False).returncode == 0
    twice = head.submit("first", tmp_path, *slow, wait=False)
    assert twice.returncode != 0  # the same id does not run twice
    assert "first" in twice.stdout + twice.stderr
    checkpoints = tmp_path / "runs/debug/checkpoints"
    deadline = time.monotonic() + 200
    while not list(checkpoints.rglob("*.json")):
        assert time.monotonic() < deadline, head.ray("job", "logs", "first").stdout
        time.sleep(1)
    assert head.ray("job", "stop", "first").returncode == 0
    assert "was stopped" in head.status("first")

    done = head.submit("second", tmp_path, *slow)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = head.ray("job", "logs", "second").stdout
    assert "digits  epoch 1/60" not in logs  # it went on where the first was stopped
    assert "epoch 60/60" in logs
    assert "nothing: zero-shot" in logs
    results = json.loads((tmp_path / "runs/debug/results/results.json").read_text())
    assert len(results["accuracy"]) == 2

    again = head.submit("third", tmp_path, *slow)
    assert again.returncode == 0
    assert "nothing to train or evaluate" in head.ray("job", "logs", "third").stdout


def test_without_the_token_nobody_gets_in(head: Head) -> None:
    from urllib.error import HTTPError
    from urllib.request import urlopen

    with pytest.raises(HTTPError) as error:
        urlopen(f"http://127.0.0.1:{PORTS['--dashboard-port']}/api/jobs/", timeout=10)
    assert error.value.code == 401


def test_what_is_submitted_stays_far_below_rays_limit() -> None:
    """Runs, shards and environments are ignored: what git tracks, and little else, goes to the cluster."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    files = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    assert sum(f.stat().st_size for f in files if f.is_file()) < 50 * 2**20
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {".venv/", "/runs/", "/prepared/"} <= set(ignored)
