"""Experiment trackers get what the run reports, and their own readers find it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from sample_results import sample_results
from wandb_file import wandb_records, wandb_rows

from diki_ray.config import Config, parse
from diki_ray.errors import ConfigError
from diki_ray.runs import tracking as module
from diki_ray.runs.tracking import tracking

NAMES = ["digits", "neon"]
LAST = {"digits/loss": 0.5, "digits/accuracy": 0.75, "digits/images_per_s": 100.0, "digits/validation_accuracy": 0.625}


def config(root: Path, *trackers: str) -> Config:
    return parse(
        {
            "run": {"name": "tracked"},
            "tasks": [{"data": f"embedded:{name}"} for name in NAMES],
            "telemetry": {"trackers": trackers, "tracking_root": str(root)},
        }
    )


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(module.PACKAGES[name]) is None,
        reason=f"{name} is NOT tried: it is not installed (pip install -e '.[{name}]')",
    )


def event(kind: str, step: int, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "task": "digits", "epoch": 0, "num_epochs": 1, "step": step, "num_steps": 10} | more


def a_run(root: Path, *trackers: str, results: bool = True) -> dict[str, Any]:
    """What a run tells its trackers; its results."""
    document = sample_results(NAMES)
    with tracking(config(root, *trackers), "own/image", print) as tracked:
        tracked.on_event(event("step", 5, loss=1.5, accuracy=0.5, images_per_s=90.0, num_nonfinite=0))
        tracked.on_event(
            event("epoch", 10, loss=0.5, accuracy=0.75, images_per_s=100.0, num_nonfinite=0, validation_accuracy=0.625)
        )
        tracked.on_event({"kind": "evaluated", "what": "batches of test images", "done": 1, "total": 2})
        if results:
            tracked.on_results(document)
    return document


def expected_matrix(results: dict[str, Any], name: str) -> list[tuple[int, float]]:
    j = NAMES.index(name)
    return list(enumerate([results["zero_shot"][j], *(row[j] for row in results["accuracy"])]))


@needs("tensorboard")
def test_tensorboard_reads_the_event_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = a_run(tmp_path, "tensorboard")
    a_run(tmp_path, "tensorboard", results=False)  # the same run again goes on in the same folder
    reader = EventAccumulator(str(tmp_path / "tensorboard" / "tracked"))
    reader.Reload()

    def series(name: str) -> list[tuple[int, float]]:
        return [(e.step, e.value) for e in reader.Scalars(name)]

    assert series("digits/loss") == [(5, 1.5), (10, 0.5)] * 2
    assert series("digits/validation_accuracy") == [(10, 0.625)] * 2
    assert dict(series("matrix/neon")) == pytest.approx(dict(expected_matrix(results, "neon")))
    assert series("summary/last") == [(2, pytest.approx(results["metrics"]["last"]["mean"]))]
    assert "config/text_summary" in reader.Tags()["tensors"]


@needs("mlflow")
def test_mlflow_reads_its_store_and_the_same_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    a_run(tmp_path, "mlflow", results=False)
    results = a_run(tmp_path, "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("diki_ray").experiment_id])
    assert run.info.run_name == "tracked"
    assert run.info.status == "FINISHED"
    assert run.data.params["train.lr"] == "5.0"
    assert run.data.tags["config_digest"] == config(tmp_path).digest()
    assert {name: run.data.metrics[name] for name in LAST} == LAST
    history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "matrix/neon")]
    assert history == expected_matrix(results, "neon")


@needs("wandb")
def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    results = a_run(tmp_path, "wandb")
    records = wandb_records(tmp_path)
    run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("diki_ray", "tracked")
    rows = wandb_rows(records)
    assert [row["digits/loss"] for row in rows if "digits/loss" in row] == [1.5, 0.5]
    assert [row["digits/step"] for row in rows if "digits/loss" in row] == [5, 10]
    matrix = [(row["matrix/step"], row["matrix/neon"]) for row in rows if "matrix/neon" in row]
    assert matrix == expected_matrix(results, "neon")


@pytest.mark.parametrize("name", sorted(module.TRACKERS))
def test_a_missing_package_is_one_sentence_before_anything_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed here; `pip install 'diki-ray\[{name}\]'`"):
        tracking(config(tmp_path, name), "own/image", print).__enter__()
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_breaks_is_said_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Written:
        def __init__(self, *_: Any) -> None:
            self.steps: list[int] = []
            self.failed: bool | None = None
            opened.append(self)

        def write(self, values: Any, step: int) -> None:
            self.steps.append(step)

        def close(self, failed: bool) -> None:
            self.failed = failed

    class Broken(Written):
        def write(self, values: Any, step: int) -> None:
            raise OSError("the server is away")

    opened: list[Written] = []
    said: list[str] = []
    monkeypatch.setattr(module, "TRACKERS", {"mlflow": Broken, "tensorboard": Written})
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    run = tracking(config(tmp_path, "mlflow", "tensorboard"), "own/image", said.append)
    tracked = run.__enter__()
    for step in (1, 2):
        tracked.on_event(event("step", step, loss=1.0, accuracy=0.0, images_per_s=1.0))
    assert not run.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert said == ["mlflow is no longer told of this run (OSError: the server is away)"]
    assert [(t.steps, t.failed) for t in opened] == [([], None), ([1, 2], True)]
