"""The share of the time that the device waits for images."""

from __future__ import annotations

import tempfile
import time

from benchmarks.training import Row, make_trainer
from benchmarks.world import World
from diki_ray.data import prepare
from diki_ray.data.stream import TrainStream
from diki_ray.data.to_device import on_device


def input_share(world: World, num_classes: int, batch: int, epochs: int, task: str = "planets") -> list[Row]:
    """The share of an epoch that the device waits for images, read from shards of an embedded task's PNG files.

    The first epoch decodes; later ones find decoded images in memory.
    """
    trainer = make_trainer(world, world.tokens(num_classes))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        index = prepare.ensure(f"embedded:{task}", folder)
        stream = TrainStream(index, "train", seed=0, batch_size=batch, transform=world.backbone.preprocess)
        for epoch in range(epochs):
            waited, count, started = 0.0, 0, time.perf_counter()
            batches = on_device(stream.epoch(epoch), world.device)
            while True:
                asked = time.perf_counter()
                one = next(batches, None)
                waited += time.perf_counter() - asked
                if one is None:
                    break
                trainer.step(
                    one.images, one.labels % num_classes
                )  # returns numbers of the loss, so it ends when the device does
                count += len(one.images)
            whole = time.perf_counter() - started
            row = {"epoch": epoch, "batch": batch, "images_per_s": count / whole, "idle_share": waited / whole}
            rows.append(row)
    return rows
