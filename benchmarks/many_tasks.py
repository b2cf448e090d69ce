"""A stream of a thousand tiny tasks end to end in one worker group: what a task takes, and the memory of each process.

The run is `diki-ray continual` in a process of its own; this one looks at its processes while it goes on. A task has 8
training and 4 test images of two classes, so that nothing but what a task costs by itself is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image

from benchmarks.growth import BACKBONE
from benchmarks.world import TEMPLATE, World
from diki_ray.store.run_store import RunStore

ROOT = Path(__file__).parents[1]
RUN = "many"
POINTS = 10
OF = {
    "StoreActor": "store_mb",
    "RayTrainWorker": "worker_mb",
    "EvaluationWorker": "evaluation_mb",
}
"""What Ray calls the processes that are looked at; the driver, in which Ray Train's controller is, was started here."""
_EVERY_S = 0.5


def many_tasks(world: World, num_tasks: int) -> list[dict[str, Any]]:
    """A row for every tenth of the tasks learnt, and one for the evaluation: its largest memory, and what it leaves."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(world, folder, num_tasks)
        command = [sys.executable, str(ROOT / "jobs" / "continual.py"), "--config", str(folder / "config.yaml")]
        environment = {n: v for n, v in os.environ.items() if n != "RAY_ADDRESS"}
        path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
        with open(folder / "output", "w") as output:
            process = subprocess.Popen(command, env=environment | {"PYTHONPATH": path}, stdout=output, stderr=output)
            rows = _watched(process, folder, num_tasks)
        if process.returncode:
            raise AssertionError((folder / "output").read_text()[-2000:])
        results = folder / "storage" / "runs" / RUN / "results"
        seconds = json.loads((results / "results.json").read_text())["seconds"]
        after = {
            "plan_s": seconds["plan"],
            "evaluate_s": seconds["evaluate"],
            "results_mb": (results / "results.json").stat().st_size / 1e6,
            "report_mb": (results / "report.html").stat().st_size / 1e6,
        }
        return [row | dict.fromkeys(after) for row in rows[:-1]] + [rows[-1] | after]


def _watched(process: subprocess.Popen[bytes], folder: Path, num_tasks: int) -> list[dict[str, Any]]:
    """Rows at every tenth of the tasks, until the process ends."""
    rows: list[dict[str, Any]] = []
    at, learnt_at, number = time.monotonic(), 0, 0
    log = folder / "storage" / "runs" / RUN / "log"
    step = max(1, num_tasks // POINTS)
    most = dict.fromkeys(("driver_mb", *OF.values()), 0.0)
    while process.poll() is None:
        time.sleep(_EVERY_S)
        entries = len(os.listdir(log)) - 1 if log.is_dir() else 0  # but for the lease
        if number == 0 and entries > 0:
            at, learnt_at, number = time.monotonic(), entries, step
        elif number > num_tasks:
            with suppress(psutil.Error):  # it may end now
                most = {column: max(mb, most[column]) for column, mb in _memory(process.pid).items()}
        elif number and entries >= number:
            row = {"tasks": entries, "s_a_task": (time.monotonic() - at) / max(1, entries - learnt_at)}
            rows.append(row | _memory(process.pid))
            at, learnt_at, number = time.monotonic(), entries, number + step
    learnt = len(RunStore.open(str(folder / "storage"), RUN).modules())
    return [*rows, {"tasks": learnt, "s_a_task": None} | most]


def _memory(pid: int) -> dict[str, float]:
    """Megabytes resident, the largest of each kind of process."""
    driver = psutil.Process(pid)
    found = {"driver_mb": driver.memory_info().rss / 1e6} | dict.fromkeys(OF.values(), 0.0)
    for child in driver.children(recursive=True):
        try:
            name, rss = " ".join(child.cmdline()), child.memory_info().rss / 1e6
        except psutil.Error:
            continue  # it has ended
        for part, column in OF.items():
            if name.startswith("ray::") and part in name:
                found[column] = max(found[column], rss)
    return found


def _write(world: World, folder: Path, num_tasks: int) -> None:
    (folder / "backbone.py").write_text(BACKBONE.format(model=world.model))
    for task in range(num_tasks):
        random = np.random.default_rng(task)
        for split, count in (("train", 4), ("test", 2)):
            for thing in ("one", "other"):
                place = folder / "data" / f"task{task}" / split / f"{thing} of {task}"
                place.mkdir(parents=True)
                for n in range(count):
                    pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                    Image.fromarray(pixels).resize((32, 32)).save(place / f"{n}.png")
    depth = {f"{tower}_depth": d for tower, d in world.method.depth.items()}
    config = {
        "run": {"name": RUN, "storage": str(folder / "storage")},
        "tasks": [{"data": str(folder / "data" / f"task{t}"), "template": TEMPLATE} for t in range(num_tasks)],
        "backbone": {"name": str(folder / "backbone.py")},
        "method": depth | {"image_length": 2, "text_length": 2},
        "statistics": {"shrinkage": "oas"},
        "routing": {"density": "task"},
        "train": {"epochs": 1, "batch_size": 8, "num_workers": 1, "device": "cpu", "num_streams": 1},
        "evaluate": {"num_workers": 1, "text_grid": 2},
        "data": {"root": str(folder / "prepared")},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
