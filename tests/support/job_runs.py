"""What the tests of recovery share: the job as a user starts it, in a session of processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diki_ray.learning.module import TaskModule
from diki_ray.store.run_store import RunStore

ROOT = Path(__file__).parents[2]
OVERRIDES = (
    "train.num_workers=2",
    "train.cpus_per_worker=0.5",
    "evaluate.cpus_per_worker=0.5",
    "train.epochs=2",  # with 4 shots of 10 classes and batches of 16: steps 0 to 5 a task
    "train.checkpoint_every_steps=1",
    "train.collective_timeout_s=15",
)
JOB_TIMEOUT_S = 500.0
GONE_WITHIN_S = 120.0
"""Ray's processes end by themselves once their driver or raylet is gone; its agents first ask the head for a minute."""
RAY_IN_TESTS = {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


STARTED: list[Job] = []
"""Every job of this process, so that a test that fails half-way leaves none behind."""


class Job:
    """One process of jobs/continual.py. Its output goes to files: orphans of a killed driver hold a pipe open."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("stdout.*")))
        self._stdout, self._stderr = folder / f"stdout.{number}", folder / f"stderr.{number}"
        with open(self._stdout, "wb") as out, open(self._stderr, "wb") as err:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True
            )
        STARTED.append(self)

    def wait(self, timeout_s: float = JOB_TIMEOUT_S) -> Ended:
        try:
            code = self.process.wait(timeout_s)
        finally:
            if self.process.poll() is None:
                self.kill_all()
        return Ended(code, self._stdout.read_text(), self._stderr.read_text())

    def output(self) -> tuple[str, str]:
        """What it wrote so far to stdout and stderr."""
        return self._stdout.read_text(), self._stderr.read_text()

    def processes(self) -> list[int]:
        """The job's own process and all that it started, in whichever way they were orphaned since."""
        return session_processes(self.process.pid)

    def kill_all(self) -> None:
        """SIGKILL to the driver, the head's processes and every worker: what a lost machine looks like."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it died of the others
        self.process.wait()

    def assert_nothing_is_left(self) -> None:
        wait_until(lambda: not self.processes(), GONE_WITHIN_S, f"processes {self.processes()} to end")


@dataclass(frozen=True)
class Run:
    folder: Path
    prepared: Path

    def begin(self, *overrides: str, faults: list[dict] | None = None, config: str = "configs/debug.yaml") -> Job:
        environment = os.environ | RAY_IN_TESTS
        if faults is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "faults.json"
            path.write_text(json.dumps(faults))
            environment["DIKI_FAULTS"] = str(path)
        command = [
            *(sys.executable, "jobs/continual.py", "--config", config),
            *(f"run.storage={self.folder}/storage", f"data.root={self.prepared}", *OVERRIDES, *overrides),
        ]
        return Job(command, environment, self.folder)

    def start(self, *overrides: str, faults: list[dict] | None = None, config: str = "configs/debug.yaml") -> Ended:
        return self.begin(*overrides, faults=faults, config=config).wait()

    def has_fired(self, number: int) -> bool:
        return (self.folder / f"fired.{number}").exists()

    def num_fired(self) -> int:
        return len(list(self.folder.glob("fired.*")))

    def digests(self) -> dict[str, str]:
        return {e.task: e.digest for e in RunStore.open(f"{self.folder}/storage", "debug").modules()}

    def modules(self) -> dict[str, TaskModule]:
        store = RunStore.open(f"{self.folder}/storage", "debug")
        return {e.task: TaskModule.from_bytes(store.read_module(e.digest)) for e in store.modules()}

    def results(self) -> dict:
        return json.loads((self.folder / "storage/runs/debug/results/results.json").read_text())

    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "storage/runs/debug/checkpoints").rglob("*.safetensors"))

    def newest_step(self) -> int | None:
        """Of the newest checkpoint of the task in training."""
        steps = [int(path.name[:8]) for path in self.checkpoints()]
        return max(steps, default=None)


def assert_equal(run: Run, undisturbed: Run) -> None:
    assert run.digests() == undisturbed.digests()
    assert run.results()["accuracy"] == undisturbed.results()["accuracy"]
    assert run.results()["zero_shot"] == undisturbed.results()["zero_shot"]


def assert_same_modules(run: Run, undisturbed: Run, atol: float) -> None:
    """From the same samples in the same global batches; parameters to `atol`."""
    mine, expected = run.modules(), undisturbed.modules()
    assert mine.keys() == expected.keys()
    for task, module in expected.items():
        assert mine[task].provenance["consumed"] == module.provenance["consumed"]
        assert mine[task].provenance["num_steps"] == module.provenance["num_steps"]
        for name, array in module.parameters.items():
            np.testing.assert_allclose(mine[task].parameters[name], array, atol=atol, rtol=0, err_msg=f"{task} {name}")


@contextmanager
def cluster_of_nodes(faults: Path) -> Iterator[Any]:
    """A cluster whose head has no CPU, and no other node yet; its nodes know the faults' file from their start."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIKI_FAULTS", str(faults))
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 4},
            },
        )
        yield cluster
        cluster.shutdown()


def wait_until(is_so: Callable[[], bool], timeout_s: float, what: str) -> None:
    until = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < until, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.1)


def session_processes(session: int) -> list[int]:
    """Process ids of a session, zombies left out. Ray's processes rename themselves, but keep their session."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended since it was listed
        if fields[0] not in "ZX" and int(fields[3]) == session:
            found.append(int(entry.name))
    return found
