"""Benchmarks rehearsed: each configuration that we ship on fabricated data, through the whole job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from s3_server import s3_bucket

from diki_ray.commands.rehearse import MARK
from diki_ray.config.protocols import protocol, protocols

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
BENCHMARKS = sorted(f"{name}/{split}" for name in protocols() for split in ("coop", "zscl"))


class Ended(NamedTuple):
    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them are rehearsed: what has the same data has the same modules."""
    return tmp_path_factory.mktemp("rehearsals")


def rehearse(benchmark: str, place: Path, job: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    code, said, error = job("rehearse", benchmark, "--storage", place / "storage", "train.cpus_per_worker=0.5")
    assert code == 0, said + error
    name, _, split = benchmark.partition("/")
    results_of = place / "storage" / "rehearsal" / "runs" / benchmark.replace("/", "-") / "results"
    known, results = protocol(name), json.loads((results_of / "results.json").read_text())
    assert results["protocol"] == f"{benchmark}/image+incomplete"
    assert [task["name"] for task in results["tasks"]] == list(known.order)
    assert len(results["accuracy"]) == len(known.order)
    assert f"Rehearsed: {len(known.order)} data sets in the layout of {benchmark}" in said
    assert "the accuracies mean nothing" in said
    assert f"continual --config {name.replace('-', '_')} protocol={benchmark} --storage {place}/storage " in said
    assert (place / "rehearsal" / split / MARK).is_file()
    # Beside published figures it does not stand.
    assert "not as many images as the published split has" in (results_of / "report.html").read_text()


@pytest.mark.long
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_benchmark_is_rehearsed(
    benchmark: str, place: Path, job: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, local_cluster: str
) -> None:
    rehearse(benchmark, place, job, monkeypatch)


@pytest.mark.long
def test_a_bucket_is_tried_by_a_rehearsal(tmp_path: Path) -> None:
    """As a user types it where nothing is: a process and a cluster of its own, and nothing local but the sources."""
    with s3_bucket() as bucket:
        done = subprocess.run(
            [sys.executable, ROOT / "jobs/rehearse.py", "mtil-fs16-8/coop", "--storage", "s3://runs/team"],
            cwd=tmp_path,
            env=os.environ | bucket.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "modules, results and report in s3://runs/team/rehearsal." in done.stdout
        keys = [found["Key"] for found in bucket.client.list_objects_v2(Bucket="runs")["Contents"]]
    assert "team/rehearsal/runs/mtil-fs16-8-coop/results/results.json" in keys
    assert any(key.startswith("team/rehearsal/prepared/SUN397-") for key in keys)
    assert [path.name for path in tmp_path.iterdir()] == ["rehearsal"]


def test_a_folder_with_something_else_in_it_is_left_alone(
    tmp_path: Path, job: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "rehearsal" / "coop" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    code, _, error = job("rehearse", "mtil-1/coop", "--storage", tmp_path / "storage")
    assert (code, list(mine.parent.iterdir())) == (2, [mine])
    assert "is not a rehearsal's" in error
