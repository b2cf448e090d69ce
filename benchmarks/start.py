"""What passes between a command and its first training step, or its first answer: seconds by stage, and whose they are.

    python -m benchmarks.start child NOTES SPAWNED COMMAND ARGUMENT…     runs a command of diki-ray and notes its stages

A stage is the time from the note before it to its own. Imports of the libraries come first, one by one, so that what is
left of `diki_ray imported` is ours. The run is stopped by its first step.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTES = "DIKI_BENCHMARK_NOTES"
STOPPED = "stopped by the benchmark"
RAYS = ("ray imported", "Ray started", "workers started")
CONFIG = str(ROOT / "configs" / "quickstart.yaml")


def note(stage: str) -> None:
    """A line in the file of notes; any process may write one."""
    with open(os.environ[NOTES], "a") as file:
        file.write(f"{time.time()} {stage}\n")


def noted(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
    """The function, whose end is noted."""

    def run(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        note(stage)
        return result

    return run


def train_tasks(loop: dict[str, Any]) -> None:
    """What runs in a worker in place of the platform's function of this name, up to its first step."""
    from diki_ray.errors import UserError
    from diki_ray.runs.train import group, worker
    from diki_ray.runs.train.observers import Observer

    class First(Observer):
        def before_step(self, *_: Any) -> None:
            if is_first:
                note("first batch read")

        def after_step(self, *_: Any) -> None:
            if is_first:
                note("first step made")
            raise UserError(STOPPED)

    import ray.train

    is_first = ray.train.get_context().get_world_rank() == 0
    if is_first:
        note("workers started")
        worker.load_backbone = noted(worker.load_backbone, "backbone loaded in the worker")
    group.injected_faults = lambda store: [First()]
    group.train_tasks(loop)  # the platform's: the driver alone has this one in its place


def child(spawned: str, command: str, *arguments: str) -> int:
    """Runs `diki-ray COMMAND` in this process as the shell would, with its stages noted."""
    with open(os.environ[NOTES], "w") as file:
        file.write(f"{spawned} spawned\n")
    note("Python started")
    import torch  # noqa: F401

    note("torch imported")
    os.environ.setdefault("DIKI_LIGHT_IMPORT", "1")  # as every command does
    from diki_ray.clip import light_import  # noqa: F401

    note("open_clip imported")
    if command == "continual":
        import ray  # noqa: F401

        note("ray imported")
        _note_training()
    else:
        _note_answering()
    note("diki_ray imported")
    from diki_ray.commands.app import run

    return run(command, arguments)


def _note_training() -> None:
    from diki_ray.commands import continual as _  # noqa: F401
    from diki_ray.runs import continual, run_cluster, store_client
    from diki_ray.runs.train import group

    continual.find_data = noted(continual.find_data, "data found")
    continual.load_backbone = noted(continual.load_backbone, "backbone loaded")
    continual.make_plan = noted(continual.make_plan, "data prepared and planned")
    run_cluster._check_capacity = noted(run_cluster._check_capacity, "Ray started")
    # Any: a class's own function is put in its place.
    client: Any = store_client.StoreClient
    client.start = staticmethod(noted(client.start, "store started"))
    import benchmarks.start

    group.train_tasks = benchmarks.start.train_tasks  # of the module's name, by which workers find it


def _note_answering() -> None:
    from diki_ray.commands import predict
    from diki_ray.prediction import run_predictor

    run_predictor.open_learnt = noted(run_predictor.open_learnt, "run opened")
    run_predictor.load_backbone = noted(run_predictor.load_backbone, "backbone loaded")
    predict.load_predictor = noted(predict.load_predictor, "predictor built")
    predict.predict = noted(predict.predict, "answered")


def start(rounds: int) -> list[dict[str, Any]]:
    """A row for each stage of quickstart, whose data is prepared already, and of `predict` of one image: medians."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = f"data.root={folder}/prepared"
        first = _stages(folder, "first", _training(f"{folder}/first", prepared))
        training = [_stages(folder, n, _training(f"{folder}/{n}", prepared)) for n in range(rounds)]
        command = ["predict", _picture(folder), "--storage", _learnt(folder), "--run", "answering"]
        answering = [_stages(folder, "answering", command) for _ in range(rounds + 1)][1:]
    rows = [
        *_rows("first training step", training),
        *_rows("first training step, of data that must be prepared", [first])[-1:],
        *_rows("first answer", answering),
    ]
    return rows


def _training(storage: str, prepared: str) -> list[str]:
    return ["continual", "--config", CONFIG, prepared, f"run.storage={storage}"]


def _learnt(folder: str) -> str:
    """A storage with a run of the embedded CLIP that has learnt two tasks, of random parameters."""
    import torch

    from diki_ray.config import parse
    from diki_ray.learning.module import TaskModule
    from diki_ray.learning.statistics import Statistics
    from diki_ray.runs.plan import build_method, load_backbone
    from diki_ray.store.process import this_process
    from diki_ray.store.run_store import CONFIG_DOCUMENT, RunStore

    storage = f"{folder}/answering"
    tasks = [{"data": "embedded:gems"}, {"data": "embedded:digits"}]
    config = parse(
        {
            "run": {"name": "answering", "storage": storage},
            "tasks": tasks,
            "method": {"image_depth": 4, "text_depth": 3},
            "statistics": {"shrinkage": "oas"},
        }
    )
    backbone = load_backbone(config)
    method = build_method(config, backbone)
    store = RunStore.open(storage, "answering")
    epoch = store.acquire(this_process("benchmark"))
    store.put_document(epoch, CONFIG_DOCUMENT, config.to_yaml())
    for number, name in enumerate(("gems", "digits")):
        names = tuple(f"{name} {n}" for n in range(10))
        size = backbone.model.visual.image_size
        height = size if isinstance(size, int) else size[0]
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            features = backbone.encode_image(torch.randn(200, 3, height, height, generator=generator))
        statistics_ = Statistics.of(features, torch.arange(200) % 10, 10)
        parameters = {n: p.detach().numpy() for n, p in method.initial(generator, None).items()}
        module = TaskModule(
            key=f"{number:064x}", task=name, class_names=names, templates=("a photo of a {}.",), method="diki",
            parameters=parameters, moments=statistics_.moments, statistics=statistics_,
            validation_features=features[:64].numpy().astype("float16"),
        )  # fmt: skip
        store.commit_module(epoch, module.key, name, module.to_bytes())
    store.release(epoch)
    return storage


def _picture(folder: str) -> str:
    from PIL import Image

    place = f"{folder}/picture.png"
    Image.new("RGB", (64, 64), "red").save(place)
    return place


def _stages(folder: str, name: Any, command: Sequence[str]) -> dict[str, float]:
    """The seconds of each stage, in order."""
    notes = Path(folder, f"notes-{name}")
    environment = {n: v for n, v in os.environ.items() if n != "RAY_ADDRESS"} | {NOTES: str(notes)}
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    words = [sys.executable, "-m", "benchmarks.start", "child", repr(time.time()), *command]
    done = subprocess.run(
        words, cwd=folder, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    times = [line.split(" ", 1) for line in notes.read_text().splitlines()]
    ends = [n for n, (_, stage) in enumerate(times) if stage in ("first step made", "answered")]
    if not ends:
        raise AssertionError(f"{command} ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-2000:]}")
    return {stage: float(at) - float(before) for (before, _), (at, stage) in pairwise(times[: ends[0] + 1])}


def _rows(what: str, measured: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    rows = [
        {"to": what, "stage": stage, "s": statistics.median(m[stage] for m in measured), "of": _whose(stage)}
        for stage in measured[0]
    ]
    return [*rows, {"to": what, "stage": "in all", "s": statistics.median(sum(m.values()) for m in measured), "of": ""}]


def _whose(stage: str) -> str:
    if stage in RAYS:
        return "Ray"
    return "others" if stage in ("Python started", "torch imported", "open_clip imported") else "ours"


if __name__ == "__main__":
    sys.exit(child(*sys.argv[2:]))
