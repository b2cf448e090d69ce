"""Recovery of training under real kills, on real local clusters: modules, statistics, ledger and accuracy matrix are
bit-equal to an undisturbed run's (a module's bytes hold its parameters, its Gaussian and what it consumed).

Every run is the job as a user starts it, in a process of its own; faults are deterministic by (task, rank, step) and
counted (diki_ray/runtime/faults.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from diki_ray.runtime.store import RunStore

ROOT = Path(__file__).parent.parent.parent
OVERRIDES = (
    "train.num_workers=2",
    "train.cpus_per_worker=0.5",
    "evaluate.cpus_per_worker=0.5",
    "train.epochs=2",
    "train.checkpoint_every_steps=1",
    "train.collective_timeout_s=15",
)


@dataclass(frozen=True)
class Run:
    folder: Path
    prepared: Path

    def start(self, *overrides: str, faults: list[dict] | None = None) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_AUTH_MODE": "disabled"}
        if faults is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "faults.json"
            path.write_text(json.dumps(faults))
            environment["DIKI_FAULTS"] = str(path)
        return subprocess.run(
            [
                *(sys.executable, "jobs/continual.py", "--config", "configs/debug.yaml"),
                *(f"run.storage={self.folder}/storage", f"data.root={self.prepared}", *OVERRIDES, *overrides),
            ],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )

    def num_fired(self) -> int:
        return len(list(self.folder.glob("fired.*")))

    def digests(self) -> dict[str, str]:
        return {e.task: e.digest for e in RunStore.open(f"{self.folder}/storage", "debug").modules()}

    def results(self) -> dict:
        return json.loads((self.folder / "storage/runs/debug/results/results.json").read_text())

    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "storage/runs/debug/checkpoints").rglob("*.safetensors"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(folder, folder / "prepared")
    done = run.start()
    assert done.returncode == 0, done.stderr
    return run


def assert_equal(run: Run, undisturbed: Run) -> None:
    assert run.digests() == undisturbed.digests()
    assert run.results()["accuracy"] == undisturbed.results()["accuracy"]
    assert run.results()["zero_shot"] == undisturbed.results()["zero_shot"]


def test_a_worker_and_the_store_killed_in_the_middle_of_tasks_change_nothing(tmp_path: Path, undisturbed: Run) -> None:
    run = Run(tmp_path, undisturbed.prepared)
    done = run.start(
        faults=[
            {"kind": "kill-worker", "task": "digits", "rank": 1, "step": 4},
            {"kind": "kill-store", "task": "gems", "rank": 0, "step": 2},
        ]
    )
    assert done.returncode == 0, done.stderr
    assert run.num_fired() == 2
    assert_equal(run, undisturbed)


def test_the_driver_killed_and_its_newest_checkpoint_damaged_change_nothing(tmp_path: Path, undisturbed: Run) -> None:
    run = Run(tmp_path, undisturbed.prepared)
    done = run.start(faults=[{"kind": "kill-driver", "task": "gems", "rank": 0, "step": 5}])
    assert done.returncode == -9
    assert list(run.digests()) == ["digits"]  # what was acknowledged is there
    newest = run.checkpoints()[-1]
    blob = bytearray(newest.read_bytes())
    blob[len(blob) // 2] ^= 1
    newest.write_bytes(bytes(blob))
    done = run.start()
    assert done.returncode == 0, done.stderr
    assert run.results()["trained"] == ["gems"]
    assert "digits: learnt already" in done.stdout
    assert_equal(run, undisturbed)


def test_what_is_not_finite_on_one_rank_is_no_step_on_any_and_a_hanging_rank_is_noticed(
    tmp_path: Path, undisturbed: Run
) -> None:
    run = Run(tmp_path, undisturbed.prepared)
    done = run.start(
        faults=[
            {"kind": "nan", "task": "digits", "rank": 1, "step": 1},
            {"kind": "hang", "task": "gems", "rank": 1, "step": 3},
        ]
    )
    assert done.returncode == 0, done.stderr
    assert run.num_fired() == 2
    digests, expected = run.digests(), undisturbed.digests()
    assert digests["gems"] == expected["gems"]  # the hang was noticed in 15 s, and cost nothing but time
    assert digests["digits"] != expected["digits"]  # one step fewer
    import numpy as np

    from diki_ray.model.module import TaskModule

    module = TaskModule.from_bytes(RunStore.open(f"{tmp_path}/storage", "debug").read_module(digests["digits"]))
    assert module.provenance["num_nonfinite_steps"] == 1
    assert all(np.isfinite(p).all() for p in module.parameters.values())


def test_nothing_but_not_finite_stops_with_the_keys_and_commits_nothing(tmp_path: Path, undisturbed: Run) -> None:
    run = Run(tmp_path, undisturbed.prepared)
    done = run.start(faults=[{"kind": "nan", "task": "digits", "rank": 0, "step": s} for s in range(3)])
    assert done.returncode == 2
    assert "not finite in 3 batches in a row" in done.stderr
    assert "last batch: " in done.stderr
    assert run.digests() == {}
