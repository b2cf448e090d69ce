"""Faults for the tests of recovery: deterministic by (task, rank, step), each fired once and counted.

`DIKI_FAULTS` names a JSON file: a list of {"kind", "task", "rank", "step"}, with "at" where it is not to strike before
a step but around what a step leaves behind (`POINTS`). A fault leaves a file `fired.<number>`
beside it before it strikes, so a restarted worker does not meet it again, and a test can count. Without the variable
nothing here does anything.

kill-worker, kill-store, kill-driver, kill-node (this worker's raylet): SIGKILL. hang: for an hour. wait: until there is
a file `go.<number>`. nan: this rank's images.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from diki_ray.runs.store_client import StoreClient

VARIABLE = "DIKI_FAULTS"
POINTS = ("step", "checkpoint", "checkpointed", "commit", "committed")
"""Before a step; with the state gathered, not yet handed to the store; with it durable, but the peers not told;
the same two of a module."""
_FOR_EVER_S = 3600.0


class Faults:
    """The faults that this process may meet."""

    def __init__(self, store: StoreClient):
        path = os.environ.get(VARIABLE)
        self.store = store
        self.folder = Path(path).parent if path else Path()
        self.faults = json.loads(Path(path).read_text()) if path else []

    def before_step(self, task: str, rank: int, step: int, images: Tensor) -> Tensor:
        """Strikes before step number `step` (over all epochs, from 0) of a rank; returns the images to go on with."""
        return self._meet("step", task, rank, step, images)

    def at(self, point: str, task: str, rank: int, step: int) -> None:
        """Strikes at another of the `POINTS`, after `step` steps."""
        self._meet(point, task, rank, step, None)

    def _meet(self, point: str, task: str, rank: int, step: int, images: Any) -> Any:
        here = (point, task, rank, step)
        for number, fault in enumerate(self.faults):
            place = (fault.get("at", "step"), fault["task"], fault["rank"], fault["step"])
            if place == here and self._first_time(number):
                images = self._strike(fault["kind"], number, images)
        return images

    def _first_time(self, number: int) -> bool:
        try:
            (self.folder / f"fired.{number}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _strike(self, kind: str, number: int, images: Any) -> Any:
        if kind == "nan":
            return images * float("nan")
        if kind == "hang":
            time.sleep(_FOR_EVER_S)
        if kind == "wait":
            until = time.monotonic() + _FOR_EVER_S
            while not (self.folder / f"go.{number}").exists() and time.monotonic() < until:
                time.sleep(0.05)
            return images
        victims = {
            "kill-worker": os.getpid,
            "kill-store": lambda: self.store.status()["pid"],
            "kill-driver": lambda: self.store.handle.holder.pid,
            "kill-node": os.getppid,
        }
        os.kill(victims[kind](), signal.SIGKILL)
        if kind in ("kill-driver", "kill-node"):
            # Workers outlive both by a moment, in which they could go on: what they leave is to be the same every time.
            time.sleep(_FOR_EVER_S)
        return images
