"""Measure the platform against a straightforward port of the method, in one run, interleaved, as ratios.

    python jobs/benchmark.py --quick                                    # a minute or two
    python jobs/benchmark.py --model tiny --classes 10 100 --batch 128 --output benchmark

The port (benchmarks/world.py) does what the published code does. It is checked to give the same losses and
answers before anything is timed. Every figure is a median over rounds in which all variants take turns.
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import open_clip
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` lies beside the package, not in it

from benchmarks import (
    attention,
    decoding,
    evaluation,
    feeding,
    growth,
    layout,
    many_tasks,
    matrix,
    prediction,
    processes,
    report,
    routing,
    serving,
    serving_day,
    start,
    store_growth,
    timing,
    training,
)
from benchmarks.world import MODELS, World

SECTIONS = (
    *("training", "evaluation", "ablation", "stream", "growth", "routing", "class_model"),
    *("input", "scaling", "memory", "layout", "decoding", "store"),
    *("start", "serving", "serving_stages", "prediction"),
    *("compile", "attention", "many_tasks", "serving_day"),
)
LONG = ("many_tasks", "serving_day")
LEFT_OUT = {"cpu": ("compile", "attention", *LONG), "cuda": ("scaling", "store", "start", *LONG)}
"""By default: compiling takes minutes on a CPU, and so do a stream of a thousand tasks and a day's requests; the two
workers of `scaling` are CPU processes, and a store and a start have little to do with a card."""
QUICK = {
    "classes": [10, 100],
    "batch": [32],
    "rounds": 2,
    "tasks": 4,
    "routing_tasks": [10, 100],
    "modules": [10, 100],
    "seconds": 1.0,
    "images": 500,
}
SERVED_TASKS = 5
MOST_CLASS_TASKS = 1000
"""The sums of a task of 512 dimensions take 2 MB."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help=f"default: all but {LEFT_OUT}")
    parser.add_argument(
        "--classes", type=int, nargs="+", default=[10, 100, 397, 1000], help="the second is what batches vary at"
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="the middle one is what all else has"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=11, help="of the stream whose matrix is evaluated")
    parser.add_argument("--stream-classes", type=int, default=20, help="of each of its tasks")
    parser.add_argument("--stream-batches", type=int, default=4, help="test batches of each of its tasks")
    parser.add_argument("--routing-tasks", type=int, nargs="+", default=[10, 100, 1000, 5000])
    parser.add_argument("--modules", type=int, nargs="+", default=[1, 10, 100, 1000, 10_000], help="of a store")
    parser.add_argument("--stream-of", type=int, default=1000, help="tasks, of the section many_tasks")
    parser.add_argument("--served-tasks", type=int, default=100, help="of the section serving_day")
    parser.add_argument("--requests", type=int, default=100_000, help="of the section serving_day")
    parser.add_argument("--images", type=int, default=5000, help="of the section prediction")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load of a server in each round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile-mode", help="of torch.compile; `reduce-overhead` is CUDA graphs")
    parser.add_argument("--quick", action="store_true", help=f"small sizes: {QUICK}")
    parser.add_argument("--output", metavar="FOLDER", help="for the figures as JSON, the tables as Markdown, and plots")
    arguments = parser.parse_args()
    if arguments.quick:
        parser.set_defaults(**QUICK)
        arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch sees no GPU on this machine; use --device cpu.", file=sys.stderr)
        return 2
    if arguments.device == "cpu" and "attention" in (arguments.sections or []):
        print("error: --sections attention compares kernels of a CUDA card; leave it out here.", file=sys.stderr)
        return 2
    arguments.sections = arguments.sections or [s for s in SECTIONS if s not in LEFT_OUT[arguments.device]]
    torch.set_num_threads(arguments.threads)
    folder = Path(arguments.output) if arguments.output else None

    def keep(measured: dict[str, Any]) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{arguments.model}.json").write_text(json.dumps(measured, indent=1) + "\n")
            (folder / f"{arguments.model}.md").write_text(report.markdown(measured))

    measured = measure(arguments, keep)
    if folder is not None:
        report.plot(measured, folder)
    report.show(measured, Console(width=None if sys.stdout.isatty() else 180))
    return 0


def measure(a: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """keep: given all that is measured so far, after every row of a table, so that a run cut short loses one row."""
    world, on_card = World.make(a.model, a.device), a.device == "cuda"
    throughput = timing.matrix_throughput(a.device, a.rounds)
    classes, batch = a.classes[min(1, len(a.classes) - 1)], a.batch[len(a.batch) // 2]
    sizes = sorted({(c, batch) for c in a.classes} | {(classes, b) for b in a.batch})
    few = max(1, a.rounds // 3)
    tower_s = routing.tower_seconds(world, batch, few) if {"routing", "class_model"} & set(a.sections) else 0.0
    sections: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "training": lambda: (training.training(world, c, b, a.rounds) for c, b in sizes),
        "evaluation": lambda: (evaluation.evaluation(world, c, b, a.rounds) for c, b in sizes),
        "ablation": lambda: (
            training.ablation(world, classes, batch, a.rounds) + evaluation.ablation(world, classes, batch, a.rounds)
        ),
        "stream": lambda: [matrix.matrix(world, a.tasks, a.stream_classes, batch, a.stream_batches, few)],
        "growth": lambda: (
            growth.growth(world, density, a.tasks, a.stream_classes, batch * a.stream_batches, few)
            for density in ("task", "classes")
        ),
        "routing": lambda: (routing.routing(world, t, batch, few, tower_s) for t in a.routing_tasks),
        "class_model": lambda: (
            routing.class_model(world, t, batch, few, tower_s) for t in a.routing_tasks if t <= MOST_CLASS_TASKS
        ),
        "input": lambda: feeding.input_share(world, classes, a.batch[0], epochs=2),
        "scaling": lambda: (row for b in a.batch for row in processes.scaling(a.model, classes, b, a.rounds)),
        "memory": lambda: processes.memory(a.model, a.device, classes, batch),
        "layout": lambda: [layout.layout(world, batch, a.rounds)],
        "decoding": lambda: decoding.decoding(world.image_size, a.rounds),
        "store": lambda: store_growth.store_growth(a.modules),
        "start": lambda: start.start(few),
        "serving": lambda: serving.serving(world, SERVED_TASKS, a.stream_classes, a.seconds, few),
        "serving_stages": lambda: serving.stages(world, SERVED_TASKS, a.stream_classes, a.rounds),
        "prediction": lambda: prediction.prediction(world, SERVED_TASKS, a.stream_classes, a.images, a.seconds, few),
        "serving_day": lambda: serving_day.serving_day(
            world, a.served_tasks, a.stream_classes, 5 * a.seconds, a.requests
        ),
        "many_tasks": lambda: many_tasks.many_tasks(world, a.stream_of),
        "compile": lambda: [training.compiled(world, classes, batch, a.rounds, a.compile_mode)],
        "attention": lambda: [attention.attention(world, batch, a.rounds)],
    }
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name() if on_card else f"{platform.machine()} ({os.cpu_count()} cores)",
        "threads": a.threads,
        "versions": {n: m.__version__ for n, m in (("torch", torch), ("open_clip", open_clip))}
        | {"python": platform.python_version()},
        "model": a.model,
        "matrix_flop_per_s": throughput,
        "sections": {},
        "seconds": {},
    }

    def noted(name: str, started: float) -> None:
        report["seconds"][name] = time.monotonic() - started
        report["peak_memory_bytes"] = (
            torch.cuda.max_memory_allocated() if on_card else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        keep(report)

    for name in a.sections:
        started = time.monotonic()
        for row in sections[name]():  # none, where a section takes no size that was asked for
            if name == "training":
                row["fraction_of_matrix_throughput"] = row["flop_per_s"] / throughput
            report["sections"].setdefault(name, []).append(row)
            noted(name, started)
        noted(name, started)
        print(f"{name}: {report['seconds'][name]:,.0f} s", file=sys.stderr, flush=True)
    return report


if __name__ == "__main__":
    sys.exit(main())
