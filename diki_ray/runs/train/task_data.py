"""What a worker reads of a task's prepared data: its parts of the training batches, and of the canonical ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diki_ray.clip.backbone import Backbone
from diki_ray.config import Config
from diki_ray.data.index import DatasetIndex
from diki_ray.data.shards import SkipLedger
from diki_ray.data.stream import Batch, TrainStream, eval_batches
from diki_ray.data.to_device import on_device
from diki_ray.learning.collective import own_parts, rank, world_size
from diki_ray.runs.plan import PlannedTask


@dataclass(frozen=True)
class TaskData:
    """A task's data as this worker sees them."""

    config: Config
    task: PlannedTask
    backbone: Backbone

    @property
    def num_parts(self) -> int:
        """The number of parts of a step and of the statistics (`TaskTrainer.num_parts`)."""
        return world_size() if self.backbone.in_lockstep else self.config.train.parts

    def train_stream(self) -> TrainStream:
        """The training batches, of which each rank reads its own parts."""
        return TrainStream(
            self.task.index,
            "train",
            seed=self.task.seed,
            batch_size=self.config.train.batch_size,
            num_streams=self.config.train.num_streams,
            world_size=world_size(),
            rank=rank(),
            num_parts=self.num_parts,
            transform=self.backbone.preprocess,
            num_threads=self.config.data.num_threads,
            ledger=self._skip_ledger("train"),
        )

    @property
    def own_parts(self) -> range:
        """The parts that this rank computes."""
        return own_parts(self.num_parts)

    def part_of(self, split: str, part: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of a part's canonical batches."""
        return ((batch.images, batch.labels) for batch in self.batches_of(split, part))

    def batches_of(self, split: str, part: int) -> Iterator[Batch]:
        """A part's canonical batches: of P parts, part p has every P-th batch from the p-th on."""
        size = self.config.train.batch_size
        num_batches = -(-self.task.index.split(split).num_samples // size)
        batches = range(part, num_batches, self.num_parts)
        yield from on_device(self._canonical(split, size, batches), self.backbone.device)
        if self.backbone.in_lockstep and len(batches) * self.num_parts < num_batches:
            images, labels = torch.zeros(0, 3, 1, 1), torch.zeros(0, dtype=torch.long)
            yield Batch(epoch=0, step=num_batches, images=images, labels=labels, keys=(), positions=(), global_size=0)

    def chosen(self, index: DatasetIndex, split: str, places: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of this rank's share of the images at these ascending places of a split."""
        size = self.config.train.batch_size
        batches = [places[first : first + size] for first in range(0, len(places), size)]
        own = batches[rank() :: world_size()]
        for batch in on_device(self._canonical(split, size, samples=own, index=index), self.backbone.device):
            yield batch.images, batch.labels
        if self.backbone.in_lockstep and len(own) * world_size() < len(batches):
            yield torch.zeros(0, 3, 1, 1), torch.zeros(0, dtype=torch.long)

    def first_images(self, split: str, number: int) -> Iterator[Tensor]:
        """The first `number` images of a split, in one batch; the same on every rank."""
        return (batch.images for batch in self._canonical(split, number, [0]))

    def _canonical(
        self,
        split: str,
        size: int,
        batches: range | list[int] | None = None,
        samples: list[NDArray[np.int64]] | None = None,
        index: DatasetIndex | None = None,
    ) -> Iterator[Batch]:
        return eval_batches(
            index or self.task.index,
            split,
            batch_size=size,
            transform=self.backbone.preprocess,
            batches=batches,
            samples=samples,
            num_threads=self.config.data.num_threads,
            ledger=self._skip_ledger(split),
        )

    def _skip_ledger(self, split: str) -> SkipLedger:
        num_samples = self.task.index.split(split).num_samples
        return SkipLedger(budget=int(self.config.data.max_skipped_fraction * num_samples))
