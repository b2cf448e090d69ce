"""Who watches a worker's way through a task: the loop calls observers at fixed points and knows nothing else of them.

The ledger of consumed samples and the progress reports are observers of every task. Tests of recovery inject another
that strikes at a given step (faults.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diki_ray.data.stream import Batch
from diki_ray.learning.collective import rank, sum_over_ranks
from diki_ray.learning.task_trainer import TaskTrainer
from diki_ray.runs.plan import PlannedTask
from diki_ray.store.interface import HeldRun

REPORT_EVERY_S = 0.5


@dataclass(frozen=True)
class Training:
    """A task that this worker trains."""

    task: PlannedTask
    trainer: TaskTrainer


class Observer:
    """The points of a task's training; by default an observer does nothing at any of them."""

    def on_resume(self, header: dict[str, Any]) -> None:
        """A checkpoint with this header was loaded, on every rank."""

    def before_epoch(self, training: Training, epoch: int) -> None:
        """An epoch is begun, or gone on with, on every rank."""

    def before_step(self, training: Training, batch: Sequence[Batch]) -> None:
        """This rank's parts of a global batch are about to make step number `trainer.progress.step`, from 0."""

    def after_step(self, training: Training, batch: Sequence[Batch], num_samples: int) -> None:
        """The step was made; num_samples: of all ranks."""

    def after_epoch(self, training: Training, epoch: int, validation_accuracy: float | None) -> None:
        """The epoch is trained and validated, on every rank; the trainer's figures are still this epoch's."""

    def recorded(self) -> dict[str, Any]:
        """What a checkpoint's header and a module's provenance carry of it. Every rank calls it at once, so it may be
        collective; what it returns on rank 0 is written."""
        return {}

    def before_checkpoint(self, training: Training) -> None:
        """The state is gathered and not yet handed to the store; on rank 0, as the three below."""

    def after_checkpoint(self, training: Training) -> None:
        """The checkpoint is durable; the other ranks have not heard of it."""

    def before_commit(self, training: Training) -> None:
        """The module is assembled and not yet handed to the store."""

    def after_commit(self, training: Training) -> None:
        """The module is durable; the other ranks have not heard of it."""


class Observers(Observer):
    """Several observers as one, called in the order given."""

    def __init__(self, observers: Sequence[Observer]):
        self._all = tuple(observers)

    def on_resume(self, header: dict[str, Any]) -> None:
        for observer in self._all:
            observer.on_resume(header)

    def before_epoch(self, training: Training, epoch: int) -> None:
        for observer in self._all:
            observer.before_epoch(training, epoch)

    def before_step(self, training: Training, batch: Sequence[Batch]) -> None:
        for observer in self._all:
            observer.before_step(training, batch)

    def after_step(self, training: Training, batch: Sequence[Batch], num_samples: int) -> None:
        for observer in self._all:
            observer.after_step(training, batch, num_samples)

    def after_epoch(self, training: Training, epoch: int, validation_accuracy: float | None) -> None:
        for observer in self._all:
            observer.after_epoch(training, epoch, validation_accuracy)

    def recorded(self) -> dict[str, Any]:
        return {name: value for observer in self._all for name, value in observer.recorded().items()}

    def before_checkpoint(self, training: Training) -> None:
        for observer in self._all:
            observer.before_checkpoint(training)

    def after_checkpoint(self, training: Training) -> None:
        for observer in self._all:
            observer.after_checkpoint(training)

    def before_commit(self, training: Training) -> None:
        for observer in self._all:
            observer.before_commit(training)

    def after_commit(self, training: Training) -> None:
        for observer in self._all:
            observer.after_commit(training)


class ConsumedSamples(Observer):
    """The ledger: a sum of one number for each (epoch, step, position), which tells whether two runs consumed the same
    samples at the same steps, whoever read them and in whichever order. A module's provenance carries it."""

    def __init__(self) -> None:
        self._own = 0

    def on_resume(self, header: dict[str, Any]) -> None:
        self._own = header["consumed"] if rank() == 0 else 0

    def after_step(self, training: Training, batch: Sequence[Batch], num_samples: int) -> None:
        self._own += sum(_ledger_entry(p.epoch, p.step, position) for p in batch for position in p.positions)

    def recorded(self) -> dict[str, Any]:
        total = sum_over_ranks(self._own)
        self._own = total if rank() == 0 else 0  # rank 0 takes over what the others have counted
        return {"consumed": total}


def _ledger_entry(epoch: int, step: int, position: int) -> int:
    mixed = (epoch + 1) * 0x9E3779B97F4A7C15 ^ (step + 1) * 0xC2B2AE3D27D4EB4F ^ (position + 1) * 0x165667B19E3779F9
    mixed = (mixed ^ (mixed >> 31)) * 0xBF58476D1CE4E5B9
    return (mixed ^ (mixed >> 27)) & (2**40 - 1)


class ProgressReports(Observer):
    """Tells the driver, through the store, now and then where an epoch stands, and how each one ended; rank 0 only."""

    def __init__(self, store: HeldRun):
        self._store = store

    def before_epoch(self, training: Training, epoch: int) -> None:
        self._epoch, self._started, self._reported, self._count = epoch, time.monotonic(), 0.0, 0

    def after_step(self, training: Training, batch: Sequence[Batch], num_samples: int) -> None:
        self._count += num_samples
        if rank() == 0 and time.monotonic() - self._reported > REPORT_EVERY_S:
            self._reported = time.monotonic()
            self._send("step", training)

    def after_epoch(self, training: Training, epoch: int, validation_accuracy: float | None) -> None:
        if rank() == 0:
            self._send("epoch", training, validation_accuracy=validation_accuracy)

    def _send(self, kind: str, training: Training, **more: Any) -> None:
        seconds, trainer = time.monotonic() - self._started, training.trainer
        self._store.record_progress(
            {
                "kind": kind,
                "task": training.task.name,
                "epoch": self._epoch,
                "num_epochs": training.task.num_epochs,
                "step": trainer.progress.step,
                "num_steps": trainer.num_steps,
                "loss": trainer.progress.loss,
                "accuracy": trainer.progress.accuracy,
                "images_per_s": self._count / seconds if seconds else 0.0,
                "num_nonfinite": trainer.num_nonfinite,
            }
            | more
        )
