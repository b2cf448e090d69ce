"""Two workers beside one, and the memory that a step takes: each measured in processes of their own."""

from __future__ import annotations

import ctypes
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.evaluation import Answering
from benchmarks.timing import timed
from benchmarks.training import Row, Steps, batch_of, make_trainer
from benchmarks.world import World
from diki_ray.learning.collective import own_parts

NUM_PARTS = (1, 2, 4, 8)
WARM_UP = 8
"""Images of the first round's batches, which are not counted: a whole step of a large model takes minutes on a CPU."""


def scaling(model: str, num_classes: int, batch: int, rounds: int) -> list[Row]:
    """1 and 2 processes of one thread with gloo on this machine, the same global batch in 1, 2, 4 and 8 parts. All take
    turns. A ratio of 1.1 is 1.1 times the time of one part on one worker, or of two parts on two."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_scaling_worker, (model, num_classes, batch, rounds, folder), nprocs=2, start_method="spawn")
        measured: dict[str, list[float]] = torch.load(Path(folder) / "seconds.pt", weights_only=True)
    seconds = {name: statistics.median(values) for name, values in measured.items()}
    rows: list[Row] = []
    for workers, base in ((1, "1/1"), (2, "2/2")):
        for parts in (p for p in NUM_PARTS if p >= workers):
            own = seconds[f"{workers}/{parts}"]
            row = {"classes": num_classes, "batch": batch, "workers": workers, "parts": parts}
            rates = {"images_per_s": batch / own, "time_ratio": own / seconds[base], "speedup": seconds["1/1"] / own}
            rows.append(row | rates)
    return rows


def _scaling_worker(rank: int, model: str, num_classes: int, batch: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    world = World.make(model, "cpu")
    tokens, (images, labels) = world.tokens(num_classes), batch_of(world, num_classes, batch)
    trainers = {parts: make_trainer(world, tokens, parts) for parts in NUM_PARTS}
    seconds: dict[str, list[float]] = {}

    def measure(workers: int, parts: int, most: int) -> None:
        own = [(images[p:most:parts], labels[p:most:parts]) for p in own_parts(parts)]
        taken = timed("cpu", lambda: trainers[parts].step_in_parts(own))
        seconds.setdefault(f"{workers}/{parts}", []).append(taken)

    for turn in range(rounds + 1):
        most = WARM_UP if turn == 0 else batch
        if rank == 0:
            for parts in NUM_PARTS:
                measure(1, parts, most)
        dist.init_process_group("gloo", f"file://{folder}/group{turn}", world_size=2, rank=rank)
        for parts in NUM_PARTS[1:]:
            dist.barrier()
            measure(2, parts, most)
        dist.destroy_process_group()
    if rank == 0:
        torch.save({name: values[1:] for name, values in seconds.items()}, f"{folder}/seconds.pt")


MEASURED = [(what, whose) for what in ("training", "evaluation") for whose in ("ours", "ports")]


def memory(model: str, device: str, num_classes: int, batch: int) -> list[Row]:
    """Peak memory of a training step and of a test batch, the platform's and the port's, above the model's own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (model, device, num_classes, batch, folder)
        mp.start_processes(_memory_worker, arguments, nprocs=len(MEASURED), start_method="spawn")
        mb = {m: float(Path(folder, "-".join(m)).read_text()) / 1e6 for m in MEASURED}
    return [
        {"of": what, "classes": num_classes, "batch": batch, "mb": mb[what, "ours"], "port_mb": mb[what, "ports"]}
        for what in ("training", "evaluation")
    ]


def _memory_worker(rank: int, model: str, device: str, num_classes: int, batch: int, folder: str) -> None:
    torch.set_num_threads(1)
    what, whose = MEASURED[rank]
    measured: Any = (Steps if what == "training" else Answering)(World.make(model, device), num_classes, batch)
    act: Callable[[], Any] = getattr(measured, whose)
    before = _held_bytes(device)
    for _ in range(2):
        act()
    Path(folder, f"{what}-{whose}").write_text(str(_peak_bytes(device) - before))


def _held_bytes(device: str) -> int:
    """Now; from here on the peak counts anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what is free but held would hide what is taken next
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak_bytes(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    """Not getrusage: there a new process begins with the peak of the one that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
