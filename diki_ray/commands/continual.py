"""`diki-ray continual`: learn a stream of tasks, or say what learning it would mean."""

from __future__ import annotations

import json
from dataclasses import asdict

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
        print("\n".join(map(plain, lines(found))))
    return 0


_WHAT = {
    "learnt": "learnt already",
    "in the library": "taken from the library",
    "to learn": "to be learnt",
    "to prepare and learn": "to be prepared and learnt",
}


def lines(found: Forecast) -> list[str]:
    """A forecast for people: the run, a line for each task, then the evaluation, times and bytes."""
    told = [f"run {found.run!r} on {found.storage}: {found.method} on {found.backbone}, device {found.device}"]
    told += [f"  {_of_task(task)}" for task in found.tasks]
    if new := [task for task in found.tasks if task.learn_s != 0]:
        told.append(f"modules to learn: {len(new)}, about {size(found.module_bytes)} of storage")
    if raw := [task for task in found.tasks if task.state == "to prepare and learn"]:
        room = size(sum(task.num_bytes for task in raw))
        told.append(f"data to prepare: about {room}; where the library has a module of the same data, it is then taken")
    return [*told, *_evaluation(found), "nothing was started and nothing was written"]


def _of_task(task: TaskForecast) -> str:
    time = f", about {about(task.learn_s)}" if task.learn_s else ""
    images = ", ".join(f"{split} {number:,}" for split, number in task.num_images.items())
    note = f"; {task.note}" if task.note else ""
    return f"{task.name}: {_WHAT[task.state]}{time} ({task.num_classes:,} classes; {images} images; {task.data}){note}"


def _evaluation(found: Forecast) -> list[str]:
    if not found.evaluates:
        return ["nothing to learn or evaluate: results of the same configuration and modules are there"]
    read = [task for task in found.tasks if task.is_read]
    num_images = sum(task.num_images.get("test", 0) for task in read)
    others = " and, of the others, the images that a new module answers" if len(read) < len(found.tasks) else ""
    evaluated = f"evaluated: {num_images:,} test images of {len(read)} data sets{others}"
    if found.seconds is None:
        return [evaluated, f"time: not known here, where steps of {found.method} on {found.device} can't be measured"]
    return [evaluated, f"time: about {about(found.seconds)} in all, as a few steps on this machine tell"]
