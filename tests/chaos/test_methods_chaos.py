"""Methods that keep more than a module under real kills, on a real cluster: a memory of exemplars, and teachers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from job_runs import ROOT, Run, assert_equal

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]
LOW_RANK = {"image_depth": 1, "text_depth": 1}
METHODS = {
    "replay": LOW_RANK | {"name": "sequential_lora", "replay": {"num_images": 15, "batch_size": 4}},
    "two teachers on a reference": LOW_RANK | {"name": "snd", "num_reference": 16, "reference_batch": 8},
    "two teachers on the task": LOW_RANK | {"name": "mulki"},
    "a teacher that follows": {"name": "mahalanobis", "average_decay": 0.9},
}
TRAINING = ("train.optimizer=adamw", "train.lr=0.01", "train.max_failures=2")


@pytest.mark.parametrize("kind", METHODS)
def test_workers_store_and_driver_killed_change_nothing(tmp_path: Path, prepared: Path, kind: str) -> None:
    file = tmp_path / "method.yaml"
    tree = yaml.safe_load((ROOT / "configs/debug.yaml").read_text())
    file.write_text(yaml.safe_dump(tree | {"method": METHODS[kind]}))
    config = str(file)
    undisturbed = Run(tmp_path / "undisturbed", prepared)
    done = undisturbed.start(*TRAINING, config=config)
    assert done.returncode == 0, done.stderr
    first, second = undisturbed.modules().values()
    assert all(len(module.provenance["history"]) == 2 for module in (first, second))
    if kind == "replay":
        assert first.exemplars is not None
        assert second.exemplars is not None
        assert second.provenance["replayed"] == [first.key]

    run = Run(tmp_path / "run", prepared)
    faults = [
        {"kind": "kill-worker", "task": "digits", "rank": 0, "step": 6, "at": "commit"},
        {"kind": "kill-store", "task": "gems", "rank": 0, "step": 1},
        {"kind": "kill-driver", "task": "gems", "rank": 0, "step": 3},
        {"kind": "kill-worker", "task": "gems", "rank": 1, "step": 5},
    ]
    assert run.start(*TRAINING, faults=faults, config=config).returncode == -9
    assert list(run.digests()) == ["digits"]
    done = run.start(*TRAINING, faults=faults, config=config)
    assert done.returncode == 0, done.stderr
    assert run.num_fired() == 4
    assert_equal(run, undisturbed)  # a module's bytes hold its exemplars
