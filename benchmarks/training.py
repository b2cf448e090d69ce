"""Training: a step against the port's, and each optimisation taken away alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import interleaved, timed, training_flop
from benchmarks.world import Port, World, all_tokens_in_the_last_block, one_text_a_row, untrimmed
from diki_ray.learning.moments import Moments
from diki_ray.learning.task_trainer import Recipe, TaskTrainer

MANY_STEPS = 10_000_000
"""Of the schedule, so that the learning rate stays what it is while steps are timed."""
LR = 1.0
Row = dict[str, Any]


def make_trainer(world: World, tokens: Tensor, num_parts: int | None = None) -> TaskTrainer:
    return TaskTrainer(world.method, tokens, Recipe(lr=LR), MANY_STEPS, world.parameters(0), num_parts=num_parts)


def batch_of(world: World, num_classes: int, batch: int) -> tuple[Tensor, Tensor]:
    return world.images(batch), (torch.arange(batch) % num_classes).to(world.device)


class Steps:
    """Steps of one task by the platform and by the port, on the same images, labels and prompts."""

    def __init__(self, world: World, num_classes: int, batch: int):
        self.world, self.tokens = world, world.tokens(num_classes)
        self.batch = batch_of(world, num_classes, batch)
        self.trainer, self.port = make_trainer(world, self.tokens), Port(world)
        self.ported = {n: p.clone().to(world.device).requires_grad_() for n, p in world.parameters(0).items()}
        self.optimizer = torch.optim.SGD(list(self.ported.values()), lr=LR)

    def ours(self) -> float:
        """The loss."""
        return self.trainer.step(*self.batch).loss

    def ports(self) -> float:
        return self.port.train_step(*self.batch, self.tokens, self.ported, self.optimizer)

    def loss_difference(self, num_steps: int = 2) -> float:
        """The largest over the first steps.

        Raises:
            AssertionError: it is more than rounding.
        """
        losses = [(self.ours(), self.ports()) for _ in range(num_steps)]
        difference = max(abs(a - b) for a, b in losses)
        if difference > (1e-4 if self.world.device == "cpu" else 5e-2):  # bfloat16
            raise AssertionError(f"the port and the platform do not compute the same losses: {losses}")
        return difference

    def text_pass(self, features: Callable[[], Tensor]) -> None:
        """Forward and backward of the text tower alone."""
        prompts = [p for n, p in self.trainer.parameters.items() if n.startswith("text.")]
        with torch.enable_grad():
            torch.autograd.grad(features().sum(), prompts)


def training(world: World, num_classes: int, batch: int, rounds: int) -> Row:
    """A step against the port's, which is checked to have the same losses; its parts; the statistics pass."""
    steps = Steps(world, num_classes, batch)
    trainer, images = steps.trainer, steps.batch[0]
    difference = steps.loss_difference()

    def statistics_pass() -> None:
        with torch.no_grad():
            Moments.of(world.backbone.encode_image(images).cpu())

    seconds = interleaved(
        world.device,
        rounds,
        ours=steps.ours,
        port=steps.ports,
        text=lambda: steps.text_pass(trainer._class_features),
        port_text=lambda: steps.text_pass(lambda: steps.port.text(steps.tokens, trainer.parameters)),
        statistics=statistics_pass,
    )
    flop = training_flop(world, steps.tokens, batch)
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

    def with_all_of_the_last_block() -> None:
        with all_tokens_in_the_last_block(world.backbone):
            trainer.step(images, labels)

    def with_one_text_a_row() -> None:
        with one_text_a_row(world.backbone):
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
        shared_beginning=with_one_text_a_row,
        last_block_for_one_token=with_all_of_the_last_block,
        no_frozen_pass=with_frozen_pass,
        no_gradients_of_frozen_weights=with_gradients_of_weights,
    )
    whole = seconds.pop("as_it_is")
    return [{"optimisation": name, "of": "training step", "without_it": s / whole} for name, s in seconds.items()]


def compiled(world: World, num_classes: int, batch: int, rounds: int, mode: str | None = None) -> Row:
    """A step with both towers through torch.compile against the step as it is; compiling itself is not in it."""
    images, labels = batch_of(world, num_classes, batch)
    tokens = world.tokens(num_classes)
    other = World.make(world.model, world.device)
    plain, fast = make_trainer(world, tokens), make_trainer(other, tokens)
    other.backbone.compile(mode=mode)
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
        "mode": mode or "default",
        "images_per_s": batch / seconds["compiled"],
        "ratio_to_uncompiled": seconds["plain"] / seconds["compiled"],
        "first_step_s": compile_s,
    }
