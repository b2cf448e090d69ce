"""Measure the platform against a straightforward port of the method, in one run, interleaved, as ratios.

    python jobs/benchmark.py --quick                                    # a minute or two
    python jobs/benchmark.py --model tiny --classes 10 100 --batch 128 --output benchmark

The port (diki_ray/benchmark/world.py) does what the published code does. It is checked to give the same losses and
answers before anything is timed. Every figure is a median over rounds in which all variants take turns.
"""

import argparse
import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
from rich.console import Console

from diki_ray.benchmark import attention, evaluation, report, routing, timing, training
from diki_ray.benchmark.world import MODELS, World

SECTIONS = ("training", "evaluation", "ablation", "stream", "routing", "input", "scaling", "compile", "attention")
LEFT_OUT = {"cpu": ("compile", "attention"), "cuda": ("scaling",)}
"""By default: compiling takes minutes on a CPU, and the two workers of `scaling` are CPU processes."""
QUICK = {"classes": [10, 100], "batch": [32], "rounds": 2, "tasks": 4, "routing_tasks": [10, 100]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help=f"default: all but {LEFT_OUT}")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 397, 1000])
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=11, help="of the stream whose matrix is evaluated")
    parser.add_argument("--stream-classes", type=int, default=20, help="of each of its tasks")
    parser.add_argument("--routing-tasks", type=int, nargs="+", default=[10, 100, 1000, 5000])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help=f"small sizes: {QUICK}")
    parser.add_argument("--output", metavar="FOLDER", help="for benchmark.json and plots")
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
    measured = measure(arguments)
    report.show(measured, Console(width=None if sys.stdout.isatty() else 180))
    if arguments.output:
        folder = Path(arguments.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{arguments.model}.json").write_text(json.dumps(measured, indent=1) + "\n")
        report.plot(measured, folder)
    return 0


def measure(a: argparse.Namespace) -> dict[str, Any]:
    world = World.make(a.model, a.device)
    throughput = timing.matrix_throughput(a.device, a.rounds)
    classes, batch = a.classes[min(1, len(a.classes) - 1)], a.batch[-1]  # of what is measured at one size only
    few = max(1, a.rounds // 3)
    sizes = [(c, b) for c in a.classes for b in a.batch]
    tower_s = routing.tower_seconds(world, batch, few) if "routing" in a.sections else 0.0
    sections: dict[str, Any] = {
        "training": lambda: [training.training(world, c, b, a.rounds) for c, b in sizes],
        "evaluation": lambda: [evaluation.evaluation(world, c, b, a.rounds) for c, b in sizes],
        "ablation": lambda: (
            training.ablation(world, classes, batch, few) + evaluation.ablation(world, classes, batch, few)
        ),
        "stream": lambda: [evaluation.stream(world, a.tasks, a.stream_classes, a.batch[0], few)],
        "routing": lambda: [routing.routing(world, t, batch, few, tower_s) for t in a.routing_tasks],
        "input": lambda: training.input_share(world, classes, a.batch[0], epochs=2),
        "scaling": lambda: [training.scaling(a.model, classes, batch, few)],
        "compile": lambda: [training.compiled(world, classes, batch, few)],
        "attention": lambda: [attention.attention(world, batch, few)],
    }
    done = {name: sections[name]() for name in a.sections}
    for row in done.get("training", []):
        row["fraction_of_matrix_throughput"] = row["flop_per_s"] / throughput
    on_card = a.device == "cuda"
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name() if on_card else platform.machine(),
        "threads": a.threads,
        "versions": {n: m.__version__ for n, m in (("torch", torch), ("open_clip", open_clip))}
        | {"python": platform.python_version()},
        "model": a.model,
        "matrix_flop_per_s": throughput,
        "peak_memory_bytes": torch.cuda.max_memory_allocated()
        if on_card
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "sections": done,
    }


if __name__ == "__main__":
    sys.exit(main())
