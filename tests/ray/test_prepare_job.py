"""`jobs/prepare.py` as a user runs it: killed midway it goes on, and ends with the bytes of a run left alone."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from job_process import run_job
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
NUM_IMAGES = 200
"""A class; of 27 KB each they fill eleven shards, so that there is a middle."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "cats_and_dogs"
    random = np.random.default_rng(0)
    for split, count in (("train", NUM_IMAGES), ("val", 8), ("test", 8)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 255, (96, 96, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i:03d}.png")
    return folder


def contents(root: Path) -> dict[str, str]:
    """sha256 of every file that a reader could see."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_in_the_middle(source: Path, root: Path) -> set[str]:
    """kill -9 as soon as a shard is there; the shards that it left. Ray ends a cluster whose driver is gone."""
    command = [sys.executable, "jobs/prepare.py", str(source), "--root", str(root), "--num-cpus", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(root.rglob("*.done.json")):
            assert process.poll() is None, "it ended before it wrote a shard"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    assert not list(root.rglob("index.json")), "it had finished before the signal came"
    return {shard.name for shard in root.rglob("*.tar")}


@pytest.mark.long
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(source: Path, tmp_path: Path, local_cluster: str) -> None:
    """What is not killed joins a cluster that is there."""

    def run(source: Path, root: Path) -> str:
        return run_job("prepare", source, "--root", root, RAY_ADDRESS=local_cluster).stdout

    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    first = run(source, undisturbed)
    assert "cats_and_dogs: 2 classes" in first
    assert f"train {2 * NUM_IMAGES:7,} images" in first

    left = kill_in_the_middle(source, disturbed)
    assert left
    run(source, disturbed)
    assert contents(disturbed) == contents(undisturbed)

    again = run(source, disturbed)
    assert "already prepared" in again
    assert contents(disturbed) == contents(undisturbed)
