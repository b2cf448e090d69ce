"""What a person sees of one real run: its metrics while it goes on, its report, its predictions, what to type next."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cluster_overlays import tool
from mlflow import MlflowClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_backbone import write_tiny_backbone
from wandb_file import wandb_records, wandb_rows

ROOT = Path(__file__).parent.parent.parent
COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 210)}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass(frozen=True)
class Run:
    storage: Path
    config: Path
    output: str
    scraped: list[Samples]
    """Every scrape while it went on, the last one after its end."""
    exposition: str
    """The last scrape as it was served."""

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.storage / "runs/seen/results/results.json").read_text())


def write_images(folder: Path, brightness: float) -> None:
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / f"{name}_<b>").mkdir(parents=True)
        for n in range(20):
            pixels = np.clip(np.array(colour) * brightness + random.normal(0, 25, (32, 32, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}_<b>" / f"{n}.png")


def write_config(folder: Path) -> Path:
    port = socket.create_server(("127.0.0.1", 0))  # the system's choice; free again when closed
    number = port.getsockname()[1]
    port.close()
    for name, brightness in (("bright", 1.0), ("dark", 0.3)):
        write_images(folder / name, brightness)
    tree = {
        "run": {"name": "seen", "storage": str(folder / "storage")},
        "tasks": [
            {"data": str(folder / "bright"), "template": "a bright photo of {}."},
            {"data": str(folder / "dark"), "template": "a dark photo of {}."},
        ],
        "backbone": {"name": os.path.relpath(write_tiny_backbone(folder), ROOT)},  # as people write it
        "data": {"root": str(folder / "prepared")},
        "method": {"image_depth": 2, "image_length": 2, "text_depth": 2, "text_length": 2},
        "train": {"epochs": 2, "batch_size": 8},
        "statistics": {"shrinkage": "oas"},
        "telemetry": {
            "port": number,
            "linger_s": 4,
            "trackers": ["tensorboard", "mlflow", "wandb"],
            "tracking_root": str(folder / "tracking"),
        },
    }
    path = folder / "seen.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        return reply.read().decode()


def samples(exposition: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("job output")
    path = write_config(folder)
    port = yaml.safe_load(path.read_text())["telemetry"]["port"]
    command = [sys.executable, "jobs/continual.py", "--config", str(path)]
    scraped: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            with contextlib.suppress(OSError):  # not up yet, or over
                scraped.append(scrape(port))
            time.sleep(0.25)
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert scraped, "the metrics were never there"
    return Run(folder / "storage", path, output, [samples(text) for text in scraped], scraped[-1])


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_metrics_are_served_while_the_run_goes_on_and_not_after_it(run: Run) -> None:
    phases = {
        p for s in run.scraped for (name, labels), v in s.items() for _, p in labels if name == "diki_phase" and v
    }
    assert {"train", "done"} <= phases
    ups = [value(s, "diki_up") for s in run.scraped]
    assert ups[0] == 1
    assert ups[-1] == 0
    learnt = [value(s, "diki_tasks_learnt") for s in run.scraped]
    assert learnt == sorted(learnt)  # it only grows
    port = yaml.safe_load(run.config.read_text())["telemetry"]["port"]
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def test_the_last_scrape_says_what_results_json_says(run: Run) -> None:
    last, results = run.scraped[-1], run.results
    names = [t["name"] for t in results["tasks"]]
    assert names == ["bright", "dark"]
    for j, task in enumerate(results["tasks"]):
        name = task["name"]
        for i in range(2):
            assert value(last, "diki_accuracy_ratio", task=name, stage=str(i + 1)) == results["accuracy"][i][j]
        assert value(last, "diki_zero_shot_accuracy_ratio", task=name) == results["zero_shot"][j]
        assert (
            value(last, "diki_integration_weight_mean", task=name, domain="learnt")
            == (task["weights"]["learnt"]["mean"])
        )
        shares = [value(last, "diki_routed_ratio", task=name, routed_to=to) for to in (*names, "frozen")]
        counts = [*task["routed"]["tasks"], task["routed"]["frozen"]]
        assert shares == [c / sum(counts) for c in counts]
        assert value(last, "diki_train_loss", task=name) == pytest.approx(task["history"][-1]["loss"])
        assert value(last, "diki_train_epochs_total", task=name) == 2
        assert value(last, "diki_train_progress_ratio", task=name) == 1
        assert value(last, "diki_train_images_per_second", task=name) > 0
        assert value(last, "diki_train_nonfinite_steps_total", task=name) == 0
        assert value(last, "diki_skipped_samples_total", task=name, split="train", reason="unreadable") == 0
    assert value(last, "diki_stream_accuracy_ratio", metric="transfer") == results["metrics"]["transfer"]["mean"]
    assert value(last, "diki_tasks_learnt") == value(last, "diki_tasks") == value(last, "diki_store_modules") == 2
    blobs = (run.storage / "library/modules").rglob("*.safetensors")
    assert value(last, "diki_store_bytes") == sum(blob.stat().st_size for blob in blobs)
    assert value(last, "diki_evaluation_progress_ratio") == 1
    assert abs(time.time() - value(last, "diki_last_progress_timestamp_seconds")) < 600


def test_what_is_served_keeps_to_the_conventions_of_prometheus(run: Run) -> None:
    promtool = tool("promtool", "the metrics of a real run were NOT checked (Debian: apt-get install prometheus)")
    done = subprocess.run([promtool, "check", "metrics"], input=run.exposition, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_every_tracker_has_the_runs_losses_and_its_matrix(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back with their own readers; tests/unit/test_tracking.py looks closer."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # whoever reads the file store has to say it, too
    losses = {task["name"]: [epoch["loss"] for epoch in task["history"]] for task in run.results["tasks"]}
    first_column = [run.results["zero_shot"][0], *(row[0] for row in run.results["accuracy"])]
    root = run.config.parent / "tracking"

    events = EventAccumulator(str(root / "tensorboard" / "seen")).Reload()
    assert [e.value for e in events.Scalars("matrix/bright")] == pytest.approx(first_column)
    client = MlflowClient(tracking_uri=(root / "mlruns").as_uri())
    (tracked,) = client.search_runs([client.get_experiment_by_name("diki_ray").experiment_id])
    assert tracked.info.status == "FINISHED"
    history = client.get_metric_history(tracked.info.run_id, "matrix/bright")
    assert [metric.value for metric in sorted(history, key=lambda m: m.step)] == first_column
    rows = wandb_rows(wandb_records(root))
    assert [row["matrix/bright"] for row in rows if "matrix/bright" in row] == first_column

    for task, expected in losses.items():
        name = f"{task}/loss"
        assert [e.value for e in events.Scalars(name)][-1] == pytest.approx(expected[-1])
        assert tracked.data.metrics[name] == expected[-1]
        assert [row[name] for row in rows if name in row][-1] == expected[-1]


def test_the_report_is_beside_the_results_and_stands_alone(run: Run) -> None:
    page = (run.storage / "runs/seen/results/report.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') >= 2
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "red &lt;b&gt;" in page  # a folder's name is a class's name: other people's text
    assert "red <b>" not in page


def test_the_output_ends_with_commands_that_work(run: Run, tmp_path: Path) -> None:
    lines = run.output.splitlines()
    again = next(line for line in lines if "jobs/continual.py" in line)
    python, *rest = shlex.split(again)
    assert shutil.which(python) is not None
    assert rest == ["jobs/continual.py", "--config", str(run.config)]
    page = next(line for line in lines if "webbrowser" in line)
    assert shlex.split(page)[-1] == (run.storage / "runs/seen/results/report.html").resolve().as_uri()
    assert "name: my_task" in run.output

    image = run.config.parent / "dark" / "blue_<b>" / "0.png"
    predict = next(line for line in lines if " predict IMAGE" in line)
    command = [str(image) if word == "IMAGE" else word for word in shlex.split(predict)]
    (answer,) = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert answer["image"] == str(image)
    assert answer["class_name"] in {f"{c} <b>" for c in COLOURS}
    assert answer["task"] == max(answer["log_densities"], key=answer["log_densities"].get)
    assert 0 < answer["weight"] <= 1


def test_one_job_makes_a_report_of_several_runs(run: Run, tmp_path: Path, job: Callable[..., tuple]) -> None:
    results = run.storage / "runs/seen/results/results.json"
    assert job("report", "seen", results, "--storage", run.storage, "--output", tmp_path / "r.html")[0] == 0
    assert (tmp_path / "r.html").read_text().count("Last, task by task") == 1
