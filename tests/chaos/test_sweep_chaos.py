"""Sweeps that are killed, that fail, that meet each other: the job as a user starts it, in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml
from job_runs import RAY_IN_TESTS, ROOT, Ended, Job, wait_until

from diki_ray.store.run_store import RunStore

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]
SECOND_EPOCH = 4
"""A step that is made only with train.epochs=2: 4 shots of 10 classes in batches of 16 are 3 steps an epoch."""


class Sweep:
    """Sweeps over one storage."""

    def __init__(self, folder: Path, prepared: Path):
        self.folder, self.prepared, self.storage = folder, prepared, folder / "storage"

    def begin(self, *overrides: str, faults: list[dict] | None = None, **fields: object) -> Job:
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | RAY_IN_TESTS
        if faults is not None:
            (self.folder / "faults.json").write_text(json.dumps(faults))
        if (self.folder / "faults.json").exists():
            environment["DIKI_FAULTS"] = str(self.folder / "faults.json")
        sweep = {"name": "s", "base": str(ROOT / "configs/debug.yaml")} | fields
        path = self.folder / f"{sweep['name']}.yaml"
        path.write_text(yaml.safe_dump(sweep, sort_keys=False))
        places = (f"run.storage={self.storage}", f"data.root={self.prepared}")
        command = [sys.executable, "jobs/sweep.py", "--config", str(path), *places, *overrides]
        return Job(command, environment, self.folder / str(sweep["name"]))

    def run(self, *overrides: str, faults: list[dict] | None = None, **fields: object) -> Ended:
        return self.begin(*overrides, faults=faults, **fields).wait()

    def document(self, name: str = "s") -> dict:
        return json.loads((self.storage / f"sweeps/{name}/sweep.json").read_text())

    def keys(self) -> dict[str, int]:
        """When each module of the library was committed."""
        return {path.name: path.stat().st_mtime_ns for path in (self.storage / "library/keys").glob("*.json")}

    def num_fired(self) -> int:
        return len(list(self.folder.glob("fired.*")))


@pytest.fixture
def sweep(tmp_path: Path, prepared: Path) -> Sweep:
    return Sweep(tmp_path, prepared)


def fault(kind: str, task: str, step: int) -> dict:
    return {"kind": kind, "task": task, "rank": 0, "step": step}


def test_a_killed_sweep_goes_on_where_it_was(sweep: Sweep) -> None:
    fields = {"parameters": {"train.epochs": [1, 2], "calibration.bias": [-1.0, 1.0]}}
    job = sweep.begin(faults=[fault("wait", "gems", SECOND_EPOCH)], **fields)
    wait_until(lambda: sweep.num_fired() == 1, 250, "the third setting to be in the middle of its second module")
    before = sweep.keys()
    assert len(before) == 3
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()

    done = sweep.run(**fields)
    assert done.returncode == 0, done.stderr
    assert "known already: 2 of 4 settings" in done.stdout
    assert "[1/2] train.epochs=2, calibration.bias=-1" in done.stdout
    after = sweep.keys()
    assert len(after) == 4
    assert {key: after[key] for key in before} == before  # none was trained a second time
    assert sweep.document()["modules_trained"] == 1
    assert all(t["validation"] for t in sweep.document()["trials"])
    job.kill_all()


def test_a_trial_that_keeps_failing_is_shown_and_the_others_finish(sweep: Sweep) -> None:
    fields = {"parameters": {"train.epochs": [2, 1]}, "max_failures": 1}
    killed = fault("kill-worker", "digits", SECOND_EPOCH)
    done = sweep.run(faults=[killed, killed], **fields)
    assert done.returncode == 0, done.stderr
    assert sweep.num_fired() == 2
    assert done.stdout.count("train.epochs=2: failed and is tried again") == 1
    assert "train.epochs=2: failed: its process was killed or crashed" in done.stdout
    first, second = sweep.document()["trials"]
    assert first["error"] == "its process was killed or crashed"
    assert second["validation"]
    assert sweep.document()["chosen"]["setting"] == {"train.epochs": 1}

    again = sweep.run(**fields)  # what failed has no result: it is tried again, and nothing else
    assert again.returncode == 0, again.stderr
    assert "known already: 1 of 2 settings" in again.stdout
    assert "[1/1] train.epochs=2: objective" in again.stdout
    assert all(t["validation"] for t in sweep.document()["trials"])


def test_no_trial_reads_a_test_split(sweep: Sweep) -> None:
    """Test shards are away: every setting gets its result, and only the chosen one's test numbers are missing."""
    fields = {"parameters": {"calibration.bias": [-1.0, 1.0]}, "orders": {"all": True}}
    elsewhere = Sweep(sweep.folder / "elsewhere", sweep.prepared)  # nothing computed there is found here
    assert elsewhere.run(parameters={}).returncode == 0
    # Named by their folders: of an embedded task a missing shard would be painted again.
    tasks = f"tasks={json.dumps([{'data': str(index.parent)} for index in sorted(sweep.prepared.rglob('index.json'))])}"
    shards = list(sweep.prepared.rglob("test-*"))
    assert shards
    for shard in shards:
        shard.rename(shard.with_name(f"away.{shard.name}"))
    try:
        done = sweep.run(tasks, **fields)
    finally:
        for shard in shards:
            shard.with_name(f"away.{shard.name}").rename(shard)
    assert done.returncode == 2
    assert "[2/2]" in done.stdout
    assert "failed" not in done.stdout
    assert "test-" in done.stderr

    again = sweep.run(tasks, **fields)
    assert again.returncode == 0, again.stderr
    assert "known already: 2 of 2 settings" in again.stdout
    assert sweep.document()["chosen"]["test"]["last"]["mean"] is not None


def test_two_sweeps_at_once_train_each_module_once(sweep: Sweep) -> None:
    """The second meets the first in the middle of a module that both need. Were it to train it, its fault would
    strike."""
    first = sweep.begin(name="one", faults=[fault("wait", "digits", 1)], parameters={"calibration.bias": [-1.0]})
    wait_until(lambda: sweep.num_fired() == 1, 200, "the first sweep to train")
    other = Sweep(sweep.folder / "other", sweep.prepared)
    other.storage = sweep.storage
    second = other.begin(name="two", faults=[fault("nan", "digits", 1)], parameters={"calibration.bias": [1.0]})
    started = sweep.storage / "tune"
    wait_until(lambda: any(started.glob("two-*/*/")), 200, "the second sweep's trial to begin")
    (sweep.folder / "go.0").touch()
    for job in (first, second):
        ended = job.wait()
        assert ended.returncode == 0, ended.stderr
    assert other.num_fired() == 0
    assert len(sweep.keys()) == 2
    (run,) = [name for name in RunStore.runs(str(sweep.storage)) if name.startswith("modules-")]
    assert sorted(e.task for e in RunStore.open(str(sweep.storage), run).modules()) == ["digits", "gems"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_asha_stops_what_falls_behind(sweep: Sweep, num_workers: int) -> None:
    """A learning rate that learns nothing is stopped after the first of three epochs, and its last module is never
    trained; with two workers the trial starts a group of Ray Train, which has to end with it."""
    fields = {
        "scheduler": "asha",
        "search": "grid" if num_workers == 2 else "optuna",
        "num_samples": 5,
        "parameters": {"train.lr": [0.05, 1e-7] if num_workers == 2 else [0.05, 0.04, 1e-7, 2e-7]},
    }
    # The stones come first: one epoch tells who learns them, which it does not of the digits.
    tasks = json.dumps([{"data": "embedded:gems", "shots": 4}, {"data": "embedded:digits", "shots": 4}])
    recipe = (f"tasks={tasks}", "train.optimizer=adamw", "train.epochs=3", f"train.num_workers={num_workers}")
    done = sweep.run(*recipe, "train.cpus_per_worker=0.5", **fields)
    assert done.returncode == 0, done.stderr
    trials = {t["setting"]["train.lr"]: t for t in sweep.document()["trials"]}
    stopped = {lr for lr, t in trials.items() if t["stopped_at_epoch"] is not None}
    assert set(trials) - stopped <= {0.05, 0.04}  # of the two that learn, the second may fall behind as well
    assert stopped & {1e-7, 2e-7}
    assert all(t["stopped_at_epoch"] < 3 for lr, t in trials.items() if lr in stopped)
    assert "stopped early, after" in done.stdout
    assert sweep.document()["chosen"]["setting"]["train.lr"] >= 0.04
    assert len(sweep.keys()) < 2 * len(trials)
