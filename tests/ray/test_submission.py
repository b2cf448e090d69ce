"""`ray job submit` to a real local head that asks for a token, as a RayJob's submitter does: results, the same id
twice, stop and submit again, a sweep."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import yaml
from token_head import PORTS, ROOT, Head, running_head, token_environment, wait_until


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    with running_head(folder, token_environment(folder), "--num-cpus=2") as head:
        yield head


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


def places(storage: Path) -> tuple[str, str]:
    return f"run.storage={storage}", f"data.root={storage}/prepared"


def training(storage: Path, name: str, *overrides: str) -> tuple[str, ...]:
    return "jobs/continual.py", "--config", "configs/debug.yaml", f"run.name={name}", *places(storage), *overrides


def test_what_is_submitted_learns_and_the_same_id_does_not_run_twice(head: Head, storage: Path) -> None:
    done = head.submit("plain", *training(storage, "plain"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing: zero-shot" in done.stdout  # the job's log, as it is followed
    assert len(json.loads((storage / "runs/plain/results/results.json").read_text())["accuracy"]) == 2
    twice = head.submit("plain", *training(storage, "plain"), wait=False)
    assert twice.returncode != 0
    assert "plain" in twice.stdout + twice.stderr


@pytest.mark.long
@pytest.mark.timeout(600)
def test_submitted_stopped_and_submitted_again(head: Head, storage: Path) -> None:
    slow = training(storage, "slow", "train.epochs=60", "train.checkpoint_every_steps=5")  # stopped in the middle
    run = storage / "runs/slow"
    assert head.submit("first", *slow, wait=False).returncode == 0
    wait_until(lambda: bool(list((run / "checkpoints").rglob("*.json"))), "a checkpoint of the first job")
    assert head.ray("job", "stop", "first").returncode == 0
    status = head.ray("job", "status", "first")
    assert "was stopped" in status.stdout + status.stderr

    done = head.submit("second", *slow)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = head.logs("second")
    assert "digits  epoch 1/60" not in logs  # it went on where the first was stopped
    assert "epoch 60/60" in logs
    assert "nothing: zero-shot" in logs
    results = json.loads((run / "results/results.json").read_text())
    assert len(results["accuracy"]) == 2


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_sweep_is_submitted_and_its_retry_runs_nothing_twice(head: Head, storage: Path, tmp_path: Path) -> None:
    sweep = {"name": "tiny", "base": str(ROOT / "configs/debug.yaml"), "parameters": {"calibration.bias": [-1.0, 1.0]}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(sweep))
    swept = ("jobs/sweep.py", "--config", str(tmp_path / "tiny.yaml"), *places(storage), "evaluate.text_grid=3")
    done = head.submit("sweep", *swept)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = head.logs("sweep")
    assert "[2/2] calibration.bias=1" in logs
    assert "chosen on validation" in logs
    path = storage / "sweeps/tiny/sweep.json"
    document = json.loads(path.read_text())
    assert document["modules_trained"] == 2
    assert document["chosen"]["test"]["last"]["mean"] > 0

    # What KubeRay does after a lost head: the same command under another id.
    retry = head.submit("sweep-retry", *swept)
    assert retry.returncode == 0, retry.stdout + retry.stderr
    assert "known already: 2 of 2 settings" in head.logs("sweep-retry")
    assert json.loads(path.read_text())["modules_trained"] == 0


def test_without_the_token_nobody_gets_in(head: Head) -> None:
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
