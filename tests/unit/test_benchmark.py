"""The benchmark measures what is equal, counts operations right, and its cost model is the formula."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training
from benchmarks.attention import mask_of, one_call, two_calls
from benchmarks.cost_model import Link, Step, speedup, step_seconds
from benchmarks.timing import training_flop
from benchmarks.world import World, untrimmed


def test_operations_are_counted_as_forward_and_gradients_of_activations_and_frozen_weights_have_none() -> None:
    """Torch counts what a step really multiplies: gradients of frozen weights would make it three times the forward
    pass, a frozen pass in training four times."""
    world = World.make("debug", "cpu")
    tokens = world.tokens(6)
    trainer = training.make_trainer(world, tokens)
    images, labels = training.batch_of(world, 6, 8)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        world.method.image_features(images, trainer.parameters)
        trainer.class_features()
    with FlopCounterMode(display=False) as step:
        trainer.step(images, labels)
    assert 1.6 < step.get_total_flops() / forward.get_total_flops() < 2.2
    counted = training_flop(world, tokens, 8)
    assert counted == pytest.approx(step.get_total_flops(), rel=0.25)  # this tower is so small that the rest counts


def test_a_step_makes_one_pass_of_each_tower_and_no_frozen_one() -> None:
    world = World.make("debug", "cpu")
    trainer = training.make_trainer(world, world.tokens(3))
    passes = []
    for name, tower in (("image", world.backbone.model.visual.transformer), ("text", world.backbone.model.transformer)):
        tower.register_forward_hook(lambda *_, name=name: passes.append(name))
    trainer.step(*training.batch_of(world, 3, 4))
    assert sorted(passes) == ["image", "text"]


def test_trimming_changes_no_loss() -> None:
    world = World.make("debug", "cpu")
    batch = training.batch_of(world, 5, 8)
    trimmed, whole = (training.make_trainer(world, world.tokens(5)) for _ in range(2))
    for _ in range(3):
        loss = trimmed.step(*batch).loss
        with untrimmed(world.backbone):
            assert whole.step(*batch).loss == pytest.approx(loss, abs=1e-5)


def steps(world: World) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer = training.make_trainer(world, world.tokens(5))
    batch = training.batch_of(world, 5, 8)
    return [trainer.step(*batch).loss for _ in range(3)], trainer.parameters


@pytest.mark.long
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_towers_train_the_same_module(backend: str) -> None:
    losses, parameters = steps(World.make("debug", "cpu"))
    world = World.make("debug", "cpu")
    world.backbone.compile(backend)
    compiled_losses, compiled = steps(world)
    assert compiled_losses == pytest.approx(losses, abs=1e-5)
    for name, expected in parameters.items():
        torch.testing.assert_close(compiled[name], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_both_softmaxes_in_one_call_are_those_of_two(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 2, n, 16, generator=generator) for n in (13, 13, 13, 5, 5)]
    one = one_call(*inputs, mask_of(13, 5, causal, "cpu"))
    torch.testing.assert_close(one, two_calls(*inputs, causal=causal), atol=1e-5, rtol=0)


def test_the_cost_model_computed_by_hand() -> None:
    step = Step(image_s=0.3, text_s=0.1, num_classes=100, num_parameters=163_840, embed_dim=512)
    link = Link(bytes_per_s=1e9, latency_s=1e-4)
    assert step_seconds(step, link, 1) == pytest.approx(0.4)
    gradient, features = 4 * 163_843, 4 * 100 * 512
    messages = 3 * (3e-4 + (gradient + features / 4 + features) / 1e9)  # three messages, over three links each
    assert step_seconds(step, link, 4) == pytest.approx(0.1 + messages)
    assert speedup(step, link, 4) == pytest.approx(0.4 / (0.1 + messages))
    floored = Step(image_s=0.3, text_s=0.1, num_classes=100, floor_s=0.05)
    assert step_seconds(floored, link, 1) == pytest.approx(0.4)
    assert step_seconds(floored, link, 1000) > 0.1
