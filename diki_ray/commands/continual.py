"""`diki-ray continual`: learn a stream of tasks, or say what learning it would mean."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from diki_ray.commands.output import about, console, plain, size
from diki_ray.config import Config
from diki_ray.runs.continual import run_continual
from diki_ray.runs.forecast import Forecast, TaskForecast, forecast
from diki_ray.runs.plan import load_backbone
from diki_ray.runs.stopping import stoppable


@stoppable
def main(config: Config, config_file: str) -> int:
    """Learn what is in the configuration and not yet in the store, and evaluate the stream; the exit code."""
    run_continual(config, console(), config_file)
    return 0


@stoppable
def plan(config: Config, as_json: bool) -> int:
    """Say what `main` would do and about how long it would take, and do none of it; the exit code."""
    found = forecast(config, load_backbone(config))
    if as_json:
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    else:
        console().print(_table(found))
        print("\n".join(map(plain, lines(found))))
    return 0


def _table(found: Forecast) -> Table:
    table = Table()
    for column in ("task", "data", "classes", "images", "what happens", "time"):
        table.add_column(column, justify="right" if column in ("classes", "time") else "left", overflow="fold")
    for task in found.tasks:
        images = ", ".join(f"{split} {number:,}" for split, number in task.num_images.items())
        cells = (task.name, task.data, f"{task.num_classes:,}", images, _what(task), _time(task))
        table.add_row(*(Text(plain(cell)) for cell in cells))
    return table


def _what(task: TaskForecast) -> str:
    return {
        "learnt": "learnt already",
        "in the library": "taken from the library",
        "to learn": "learnt",
        "to prepare and learn": "prepared, then learnt",
    }[task.state]


def _time(task: TaskForecast) -> str:
    if task.learn_s is None:
        return "not known"
    return about(task.learn_s) if task.learn_s else "–"


def lines(found: Forecast) -> list[str]:
    """What the table does not say: the evaluation, times and bytes."""
    new = [task for task in found.tasks if task.learn_s != 0]
    told = [f"run {found.run!r} on {found.storage}: {found.method} on {found.backbone}, device {found.device}"]
    if any(task.state == "to prepare and learn" for task in found.tasks):
        size_of_data = size(sum(t.num_bytes for t in found.tasks if t.state == "to prepare and learn"))
        told.append(f"prepared data take about {size_of_data}; a module of the same data in the library is then taken")
    if new:
        told.append(f"modules to learn: {len(new)}, about {size(found.module_bytes)} of storage")
    if not found.evaluates:
        return [*told, "nothing to learn or evaluate: results of the same configuration and modules are there"]
    read = [task for task in found.tasks if task.is_read]
    num_images = sum(task.num_images.get("test", 0) for task in read)
    others = " and, of the others, the images that a new module answers" if len(read) < len(found.tasks) else ""
    told.append(f"evaluated: {num_images:,} test images of {len(read)} data sets{others}")
    if found.seconds is None:
        told.append(
            f"time: not known here, for it is measured on this machine's {found.device} with steps of this method"
        )
    else:
        told.append(f"time: about {about(found.seconds)} in all, as a few steps on this machine tell")
    return [*told, "nothing was started and nothing was written"]
