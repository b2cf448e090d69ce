"""What training a task took: seconds, processor seconds, peak memory. Kept with the module's record in the library, not
in the module, which stays the same whoever trained it."""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import torch

Cost = dict[str, float]


class CostMeter:
    """Measures this process from its making on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _forget_peak()
        self._started, self._cpu_started = time.monotonic(), time.process_time()

    def read(self) -> Cost:
        """seconds of this process, processor seconds of all its threads, and the most bytes that it had at once: of the
        GPU's memory where it trains on one, else its whole resident memory, libraries and all."""
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _peak_resident()
        return {
            "seconds": round(time.monotonic() - self._started, 3),
            "cpu_seconds": round(time.process_time() - self._cpu_started, 3),
            "peak_bytes": peak,
        }


def merged(costs: Sequence[Cost]) -> Cost:
    """Adds up what the workers of one task took: the slowest one's seconds, all processor seconds, the largest peak."""
    return {
        "seconds": max(c["seconds"] for c in costs),
        "cpu_seconds": round(sum(c["cpu_seconds"] for c in costs), 3),
        "peak_bytes": max(c["peak_bytes"] for c in costs),
    }


def _forget_peak() -> None:
    """Linux starts its high-water mark anew. What an earlier task left unused is given back first: a sweep's process
    trains one setting after another, and each is to show its own peak."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return  # another libc or system: the peak is that of the process's whole life


def _peak_resident() -> int:
    """Bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
