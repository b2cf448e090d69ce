"""Low-rank fine-tuning from task to task, and what is put on top of it against forgetting."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbone import write_tiny_backbone
from torch.nn import functional as F

from diki_ray.clip.backbone import Backbone, load
from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods import SequentialLora, Step, TrainingBatch
from diki_ray.learning.methods.badam import BAdam
from diki_ray.learning.methods.ewc import Ewc
from diki_ray.learning.methods.low_rank import kept, trained

SETTINGS: dict[str, Any] = {
    "rank": 2,
    "alpha": 1.0,
    "image_depth": 1,
    "text_depth": 1,
    "against_forgetting": "none",
    "wise_ft": 1.0,
    "ewc_lambda": 1000.0,
    "badam_std": 0.01,
    "blip_prior": 1e-4,
}


@pytest.fixture
def backbone(tmp_path: Path) -> Backbone:
    return load(str(write_tiny_backbone(tmp_path)))


def method_of(backbone: Backbone, **settings: Any) -> SequentialLora:
    return SequentialLora(backbone, **(SETTINGS | settings))


def moved(method: SequentialLora) -> Parameters:
    """Factors that change something."""
    generator = torch.Generator().manual_seed(1)
    start = trained(method.initial(generator))
    return {n: torch.randn(p.shape, generator=generator) * 0.3 for n, p in start.items()}


def images_and_tokens(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return images, backbone.tokenize(["cat", "dog", "owl"], "a {}.")


def write_into_weights(model: Any, parameters: Parameters, share: float) -> None:
    """W ← W + share · (α/r) B A in the first block of each tower, q, k and v one below the other."""
    for tower, block in (
        ("image", model.visual.transformer.resblocks[0]),
        ("text", model.transformer.resblocks[0]),
    ):
        changes = [
            parameters[f"{tower}.layer0.{part}_up"] @ parameters[f"{tower}.layer0.{part}_down"] for part in "qkv"
        ]
        block.attn.in_proj_weight += share * SETTINGS["alpha"] / SETTINGS["rank"] * torch.cat(changes)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_features_are_those_of_weights_that_are_changed_or_interpolated(backbone: Backbone, share: float) -> None:
    method = method_of(backbone, wise_ft=share)
    parameters, (images, tokens) = moved(method), images_and_tokens(backbone)
    with torch.no_grad():
        answering = method.effective(parameters)
        found = method.image_features(images, answering), method.text_features(tokens, answering)
        assert not torch.allclose(found[0], backbone.encode_image(images), atol=1e-3)
        write_into_weights(backbone.model, parameters, share)
        expected = backbone.encode_image(images), backbone.encode_text(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_wise_ft_changes_answers_and_not_the_training(backbone: Backbone) -> None:
    method, step = method_of(backbone, wise_ft=0.3), Step(0, 10, 0.1, 0)
    parameters = moved(method)
    assert all(torch.equal(p, parameters[n]) for n, p in method.effective(parameters, step).items())


def test_the_fisher_information_is_the_mean_of_squared_gradients_of_single_images(backbone: Backbone) -> None:
    method = method_of(backbone, against_forgetting="ewc")
    parameters, (images, tokens) = moved(method), images_and_tokens(backbone)
    labels, features = torch.tensor([0, 1, 2, 1, 0]), torch.zeros(5, 32)
    two = [TrainingBatch(images[r], labels[r], features[r], tokens) for r in (slice(0, 2), slice(2, 5))]
    first, second = (method.sums(parameters, batch) for batch in two)
    fisher = kept("fisher", method.finish(parameters, {n: first[n] + second[n] for n in first}))

    name = "image.layer0.v_up"
    squares = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        own = {n: p.clone().requires_grad_() for n, p in parameters.items()}
        logits = backbone.logits(method.image_features(image, own), method.text_features(tokens, own))
        (-F.log_softmax(logits, 1)[0, label]).sum().backward()
        squares.append(own[name].grad ** 2)
    torch.testing.assert_close(fisher[name], torch.stack(squares).mean(0), rtol=1e-4, atol=1e-9)
    assert set(fisher) == set(parameters)


def test_the_fisher_information_of_all_tasks_so_far_is_summed() -> None:
    ewc, start = Ewc(2.0), {"w": torch.tensor([1.0, 2.0])}
    assert ewc.kept(start, None) == {}
    module = start | {"fisher/w": torch.tensor([3.0, 0.0])}
    during = start | ewc.kept(start, module)
    assert during["anchor/w"].tolist() == [1.0, 2.0]
    sums = {"squares/w": torch.tensor([8.0, 4.0]), "count/images": torch.tensor(4)}
    assert ewc.finish(during, sums)["fisher/w"].tolist() == [5.0, 1.0]


def test_the_ewc_penalty_by_hand() -> None:
    ewc = Ewc(2.0)
    assert ewc.penalty({"w": torch.ones(2)}) is None  # nothing to keep in the first task
    parameters = {
        "w": torch.tensor([2.0, 5.0], requires_grad=True),
        "anchor/w": torch.tensor([1.0, 1.0]),
        "fisher/w": torch.tensor([3.0, 0.5]),
    }
    penalty = ewc.penalty(parameters)
    assert penalty is not None
    assert penalty.item() == pytest.approx(2 / 2 * (3 * 1**2 + 0.5 * 4**2))
    (gradient,) = torch.autograd.grad(penalty, parameters["w"])
    assert gradient.tolist() == [2 * 3 * 1, 2 * 0.5 * 4]


def test_a_badam_step_by_hand() -> None:
    badam, start = BAdam(0.5), {"w": torch.tensor([1.0, -2.0])}
    parameters = start | badam.kept(start, None)
    step = Step(0, 10, 0.1, 7, num_samples=4)
    noise = torch.randn(2, generator=step.generator())
    drawn = badam.drawn(start, parameters, step)
    torch.testing.assert_close(drawn["w"], start["w"] + 0.5 * noise)

    parameters["w"] = torch.tensor([9.0, 9.0])  # whatever the run's own optimiser made of it
    badam.after_step(parameters, {"w": torch.tensor([0.3, -0.6])}, step)
    for n, g in enumerate((1.2, -2.4)):  # of the sum over 4 images
        m, v = 0.1 * g, 0.001 * g**2
        rate = 0.1 * 0.5**2 * math.sqrt(1 - 0.999) / (1 - 0.9)
        assert parameters["w"][n].item() == pytest.approx(start["w"][n].item() - rate * m / (math.sqrt(v) + 1e-10))
        pull = g * noise[n].item()
        expected = 0.5 * math.sqrt(1 + (0.5 * 0.5 * pull) ** 2) - 0.5 * 0.5**2 * pull
        assert parameters["sigma/w"][n].item() == pytest.approx(expected)
    assert torch.equal(parameters["w"], parameters["mean/w"])


def test_badam_moves_a_weight_that_it_is_sure_of_less() -> None:
    badam, start = BAdam(0.5), {"w": torch.zeros(2)}
    parameters = start | badam.kept(start, None) | {"sigma/w": torch.tensor([0.5, 0.05])}
    badam.after_step(parameters, {"w": torch.ones(2)}, Step(0, 10, 0.1, 7, num_samples=4))
    unsure, sure = parameters["w"].abs().tolist()
    assert sure == pytest.approx(unsure / 100, rel=1e-4)


def test_badam_carries_deviations_to_the_next_task_and_nothing_else() -> None:
    badam, start = BAdam(0.5), {"w": torch.zeros(2)}
    during = start | badam.kept(start, None)
    during["sigma/w"] = torch.tensor([0.1, 0.2])
    held = badam.finish(during, {})
    assert list(held) == ["sigma/w"]
    assert badam.kept(start, start | held)["sigma/w"].tolist() == held["sigma/w"].tolist()
