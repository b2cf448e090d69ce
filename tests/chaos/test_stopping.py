"""Ctrl-C (to the whole process group, as a terminal sends it) and SIGTERM: said at once, done soon, and it goes on."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from job_runs import RAY_IN_TESTS, ROOT, Job, Run, wait_until

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]
SAID_WITHIN_S = 1.0
DONE_WITHIN_S = 15.0


def begin(folder: Path, *command: object) -> Job:
    return Job([sys.executable, *map(str, command)], os.environ | RAY_IN_TESTS, folder)


def stop(job: Job, number: signal.Signals, when: Callable[[], bool], what: str) -> None:
    """Sends the signal when `when` says so, and sees that the job ends as it is promised."""

    def so_or_ended() -> bool:
        return job.process.poll() is not None or when()

    wait_until(so_or_ended, 200.0, what)
    assert job.process.poll() is None, f"it ended before {what}: {job.output()}"
    sent = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(job.process.pid, number)
    else:
        job.process.send_signal(number)
    wait_until(lambda: "Stopping…" in job.output()[1], SAID_WITHIN_S, f"the word: {job.output()}")
    said = time.monotonic() - sent
    ended = job.wait(DONE_WITHIN_S)
    print(f"{what}: {number.name} said after {said:.2f} s, ended after {time.monotonic() - sent:.2f} s")
    assert ended.returncode == 128 + number
    assert "Traceback" not in ended.stderr
    assert "***" not in ended.stderr, "a dump of the native stack"
    assert ended.stderr.count("Stopping…") == 1
    job.assert_nothing_is_left()


def test_training_and_evaluation_stop_and_the_same_command_goes_on(tmp_path: Path, prepared: Path) -> None:
    run = Run(tmp_path, prepared)
    job = run.begin("train.epochs=40")
    stop(job, signal.SIGINT, lambda: bool(run.checkpoints()), "a checkpoint in training")
    assert run.digests() == {}
    job = run.begin("train.epochs=2")
    stop(job, signal.SIGTERM, lambda: "evaluating" in job.output()[0], "evaluation")
    learnt = run.digests()
    assert len(learnt) == 2
    done = run.start("train.epochs=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("learnt already") == 2
    assert run.digests() == learnt


def test_jobs_that_read_a_run_stop(undisturbed: Run, tmp_path: Path) -> None:
    storage = f"{undisturbed.folder}/storage"
    job = begin(tmp_path / "evaluate", "jobs/evaluate.py", storage, "debug", "--no-cache", "--split", "train")
    stop(job, signal.SIGINT, lambda: "batches of test images" in job.output()[1], "the first batch")
    answers = tmp_path / "answers.jsonl"
    command = ("jobs/predict.py", *[undisturbed.prepared / "digits"] * 40, "--storage", storage, "--run", "debug")
    job = begin(tmp_path / "predict", *command, "--output", answers)
    stop(job, signal.SIGTERM, lambda: bool(list(tmp_path.glob("*answers*"))), "the output")
    assert not answers.exists()


def test_preparation_stops(tmp_path: Path) -> None:
    tasks = ("embedded:gems", "embedded:digits", "embedded:mist", "embedded:neon")
    job = begin(tmp_path / "job", "jobs/prepare.py", *tasks, "--root", tmp_path / "prepared", "--num-cpus", 1)
    stop(job, signal.SIGTERM, lambda: bool(list(tmp_path.rglob("*.done.json"))), "the first shard")


def test_a_sweep_stops(tmp_path: Path, prepared: Path) -> None:
    sweep = {"name": "s", "base": f"{ROOT}/configs/debug.yaml", "parameters": {"train.epochs": [40, 41]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    places = (f"run.storage={tmp_path}/storage", f"data.root={prepared}")
    overrides = ("train.checkpoint_every_steps=1", "train.cpus_per_worker=0.5", "evaluate.cpus_per_worker=0.5")
    job = begin(tmp_path / "job", "jobs/sweep.py", "--config", tmp_path / "sweep.yaml", *places, *overrides)
    stop(job, signal.SIGINT, lambda: bool(list(tmp_path.rglob("checkpoints/**/*.safetensors"))), "a checkpoint")
