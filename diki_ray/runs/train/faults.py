"""Faults for the tests of recovery: deterministic by (task, rank, step), each fired once and counted.

`DIKI_FAULTS` names a JSON file: a list of {"kind", "task", "rank", "step"}, with "at" where a fault is not to strike
before a step ("step"): "checkpoint" and "commit", with what is to become durable not yet handed to the store;
"checkpointed" and "committed", with it durable, but the peers not told. A fault leaves a file `fired.<number>` beside
that file before it strikes, so a restarted worker does not meet it again, and a test can count. Without the variable
no worker has this observer.

kill-worker, kill-store, kill-driver, kill-node (this worker's raylet): SIGKILL. hang: for an hour. wait: until there is
a file `go.<number>`. nan: this rank's images.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diki_ray.data.stream import Batch
from diki_ray.learning.collective import rank
from diki_ray.runs.train.observers import Observer, Training
from diki_ray.store.interface import HeldRun

VARIABLE = "DIKI_FAULTS"
_FOR_EVER_S = 3600.0


def injected_faults(store: HeldRun) -> Sequence[Observer]:
    """The observer that brings this process's faults; none without the variable, as in every run but a test's."""
    path = os.environ.get(VARIABLE)
    return (Faults(store, Path(path)),) if path else ()


class Faults(Observer):
    """Strikes at the points of a file's faults."""

    def __init__(self, store: HeldRun, file: Path):
        self.store = store
        self.folder = file.parent
        self.faults: list[dict[str, Any]] = json.loads(file.read_text())

    def before_step(self, training: Training, batch: Sequence[Batch]) -> None:
        self._meet("step", training, batch)

    def before_checkpoint(self, training: Training) -> None:
        self._meet("checkpoint", training)

    def after_checkpoint(self, training: Training) -> None:
        self._meet("checkpointed", training)

    def before_commit(self, training: Training) -> None:
        self._meet("commit", training)

    def after_commit(self, training: Training) -> None:
        self._meet("committed", training)

    def _meet(self, point: str, training: Training, batch: Sequence[Batch] = ()) -> None:
        here = (point, training.task.name, rank(), training.trainer.progress.step)
        for number, fault in enumerate(self.faults):
            place = (fault.get("at", "step"), fault["task"], fault["rank"], fault["step"])
            if place == here and self._first_time(number):
                self._strike(fault["kind"], number, batch)

    def _first_time(self, number: int) -> bool:
        try:
            (self.folder / f"fired.{number}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _strike(self, kind: str, number: int, batch: Sequence[Batch]) -> None:
        if kind == "nan":
            for part in batch:
                part.images.fill_(float("nan"))
            return
        if kind == "hang":
            time.sleep(_FOR_EVER_S)
        if kind == "wait":
            until = time.monotonic() + _FOR_EVER_S
            while not (self.folder / f"go.{number}").exists() and time.monotonic() < until:
                time.sleep(0.05)
            return
        victims = {
            "kill-worker": os.getpid,
            "kill-store": lambda: self.store.status()["pid"],
            "kill-driver": lambda: self.store.status()["driver_pid"],
            "kill-node": os.getppid,
        }
        os.kill(victims[kind](), signal.SIGKILL)
        if kind in ("kill-driver", "kill-node"):
            # Workers outlive both by a moment, in which they could go on: what they leave is to be the same every time.
            time.sleep(_FOR_EVER_S)
