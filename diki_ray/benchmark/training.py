"""Training: against the port, each optimisation taken away alone, two workers, and waiting for input."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from diki_ray.benchmark.timing import interleaved, timed, training_flop
from diki_ray.benchmark.world import Port, World, untrimmed
from diki_ray.data import prepare
from diki_ray.data.stream import TrainStream
from diki_ray.data.transfer import on_device
from diki_ray.model.gaussian import Moments
from diki_ray.model.residual import Parameters
from diki_ray.model.training import Recipe, TaskTrainer, cosine_lr

MANY_STEPS = 10_000_000
"""Of the schedule, so that the learning rate stays what it is while steps are timed."""
Row = dict[str, Any]


def make_trainer(world: World, tokens: Tensor) -> TaskTrainer:
    return TaskTrainer(world.method, tokens, Recipe(lr=1.0), MANY_STEPS, world.parameters(0))


def batch_of(world: World, num_classes: int, batch: int) -> tuple[Tensor, Tensor]:
    return world.images(batch), (torch.arange(batch) % num_classes).to(world.device)


def text_pass(trainer: TaskTrainer, features: Any) -> None:
    """Forward and backward of the text tower alone."""
    with torch.enable_grad():
        torch.autograd.grad(features().sum(), [p for n, p in trainer.parameters.items() if n.startswith("text.")])


def training(world: World, num_classes: int, batch: int, rounds: int) -> Row:
    """Steps of one task against the port's, on the same images, labels and prompts; the same losses, checked first.

    Raises:
        AssertionError: the losses differ by more than rounding.
    """
    tokens = world.tokens(num_classes)
    images, labels = batch_of(world, num_classes, batch)
    port, ours = Port(world), make_trainer(world, tokens)
    ported = {n: p.clone().to(world.device).requires_grad_() for n, p in world.parameters(0).items()}
    optimizer = torch.optim.SGD(list(ported.values()), lr=1.0)
    losses: list[tuple[float, float]] = []
    for step in range(3):
        optimizer.param_groups[0]["lr"] = cosine_lr(step, MANY_STEPS, 1.0)
        losses.append((ours.step(images, labels).loss, port.train_step(images, labels, tokens, ported, optimizer)))
    difference = max(abs(a - b) for a, b in losses)
    if difference > (1e-4 if world.device == "cpu" else 5e-2):  # bfloat16
        raise AssertionError(f"the port and the platform do not compute the same losses: {losses}")

    def statistics_pass() -> None:
        with torch.no_grad():
            Moments.of(world.backbone.encode_image(images).cpu())

    seconds = interleaved(
        world.device,
        rounds,
        ours=lambda: ours.step(images, labels),
        port=lambda: port.train_step(images, labels, tokens, ported, optimizer),
        text=lambda: text_pass(ours, ours._class_features),
        port_text=lambda: text_pass(ours, lambda: port.text(tokens, ours.parameters)),
        statistics=statistics_pass,
    )
    flop = training_flop(world, num_classes, batch, world.backbone._needed_length(tokens))
    return {
        "classes": num_classes,
        "batch": batch,
        "images_per_s": batch / seconds["ours"],
        "port_images_per_s": batch / seconds["port"],
        "ratio": seconds["port"] / seconds["ours"],
        "text_share": seconds["text"] / seconds["ours"],
        "port_text_share": seconds["port_text"] / seconds["port"],
        "statistics_images_per_s": batch / seconds["statistics"],
        "flop_per_s": flop / seconds["ours"],
        "loss_difference": difference,
    }


def ablation(world: World, num_classes: int, batch: int, rounds: int) -> list[Row]:
    """What a step costs with one optimisation taken away, against the step as it is."""
    images, labels = batch_of(world, num_classes, batch)
    trainer = make_trainer(world, world.tokens(num_classes))

    def with_77_tokens() -> None:
        with untrimmed(world.backbone):
            trainer.step(images, labels)

    def with_frozen_pass() -> None:
        with torch.no_grad():
            world.backbone.encode_image(images)
        trainer.step(images, labels)

    def with_gradients_of_weights() -> None:
        weights = [p for p in world.backbone.model.parameters() if p.is_floating_point()]
        for p in weights:
            p.requires_grad_(True)
        logits = world.backbone.logits(
            world.method.image_features(images, trainer.parameters), trainer._class_features()
        )
        torch.autograd.grad(logits.sum(), [*weights, *trainer.parameters.values()], allow_unused=True)
        for p in weights:
            p.requires_grad_(False)

    seconds = interleaved(
        world.device,
        rounds,
        as_it_is=lambda: trainer.step(images, labels),
        trim=with_77_tokens,
        no_frozen_pass=with_frozen_pass,
        no_gradients_of_frozen_weights=with_gradients_of_weights,
    )
    whole = seconds.pop("as_it_is")
    return [{"optimisation": name, "of": "training step", "without_it": s / whole} for name, s in seconds.items()]


def compiled(world: World, num_classes: int, batch: int, rounds: int) -> Row:
    """A step with both towers through torch.compile against the step as it is; compiling itself is not in it."""
    images, labels = batch_of(world, num_classes, batch)
    tokens = world.tokens(num_classes)
    other = World.make(world.model, world.device)
    plain, fast = make_trainer(world, tokens), make_trainer(other, tokens)
    other.backbone.compile()
    compile_s = timed(world.device, lambda: fast.step(images, labels))
    seconds = interleaved(
        world.device,
        rounds,
        plain=lambda: plain.step(images, labels),
        compiled=lambda: fast.step(images, labels),
    )
    return {
        "classes": num_classes,
        "batch": batch,
        "images_per_s": batch / seconds["compiled"],
        "ratio_to_uncompiled": seconds["plain"] / seconds["compiled"],
        "first_step_s": compile_s,
    }


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


def scaling(model: str, num_classes: int, batch: int, rounds: int) -> Row:
    """1 and 2 processes of one thread with gloo on this machine, the same global batch; and 2 that don't split the
    classes. The two take turns."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_scaling_worker, (model, num_classes, batch, rounds, folder), nprocs=2, start_method="spawn")
        seconds: dict[str, list[float]] = torch.load(Path(folder) / "seconds.pt", weights_only=True)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "classes": num_classes,
        "batch": batch,
        "one_worker_images_per_s": batch / median["one"],
        "two_workers_images_per_s": batch / median["two"],
        "speedup": median["one"] / median["two"],
        "speedup_without_class_split": median["one"] / median["two_unsplit"],
    }


def _scaling_worker(rank: int, model: str, num_classes: int, batch: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    world = World.make(model, "cpu")
    trainer = make_trainer(world, world.tokens(num_classes))
    images, labels = batch_of(world, num_classes, batch)
    split = trainer._class_features

    def unsplit(parameters: Parameters | None = None) -> Tensor:
        return world.method.text_features(trainer.class_tokens, trainer.parameters)

    seconds: dict[str, list[float]] = {"one": [], "two": [], "two_unsplit": []}
    for turn in range(rounds + 1):  # the first is a warm-up
        if rank == 0:
            seconds["one"].append(timed("cpu", lambda: trainer.step(images, labels)))
        dist.init_process_group("gloo", f"file://{folder}/group{turn}", world_size=2, rank=rank)
        for name, features in (("two", split), ("two_unsplit", unsplit)):
            trainer._class_features = features  # type: ignore[method-assign]
            dist.barrier()
            seconds[name].append(timed("cpu", lambda: trainer.step(images[rank::2], labels[rank::2])))
        dist.destroy_process_group()
        trainer._class_features = split  # type: ignore[method-assign]
    if rank == 0:
        torch.save({name: values[1:] for name, values in seconds.items()}, f"{folder}/seconds.pt")
