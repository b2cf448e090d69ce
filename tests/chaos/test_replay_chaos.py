"""A memory of exemplars under real kills, on a real cluster: it is restored as it was, and the modules with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from job_runs import ROOT, Run, assert_equal

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]
METHOD = {"name": "sequential_lora", "image_depth": 1, "text_depth": 1, "replay": {"num_images": 15, "batch_size": 4}}


def test_a_memory_is_restored_to_the_bit_when_workers_store_and_driver_are_killed(
    tmp_path: Path, prepared: Path
) -> None:
    file = tmp_path / "replay.yaml"
    tree = yaml.safe_load((ROOT / "configs/debug.yaml").read_text())
    file.write_text(yaml.safe_dump(tree | {"method": METHOD}))
    config = str(file)
    undisturbed = Run(tmp_path / "undisturbed", prepared)
    done = undisturbed.start("train.lr=0.05", config=config)
    assert done.returncode == 0, done.stderr
    first, second = undisturbed.modules().values()
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
    assert run.start("train.lr=0.05", "train.max_failures=2", faults=faults, config=config).returncode == -9
    assert list(run.digests()) == ["digits"]
    done = run.start("train.lr=0.05", "train.max_failures=2", faults=faults, config=config)
    assert done.returncode == 0, done.stderr
    assert run.num_fired() == 4
    assert_equal(run, undisturbed)  # a module's bytes hold its exemplars
