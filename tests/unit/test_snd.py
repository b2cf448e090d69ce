"""SND: which teacher an image gets, and what is distilled from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbone import write_tiny_backbone

from diki_ray.clip.backbone import load
from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods import Snd, Step
from diki_ray.learning.methods.low_rank import keep, trained
from diki_ray.learning.methods.snd import gate

STEP = Step(3, 10, 0.1, 5)


def method_of(path: Path, **settings: Any) -> Snd:
    values: dict[str, Any] = {"rank": 2, "alpha": 1.0, "image_depth": 1, "text_depth": 1, "reference_batch": 99}
    method = Snd(load(str(path)), **(values | {"previous_weight": 9.0, "pretrained_weight": 0.5} | settings))
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    method.reference = lambda: (images, [])  # captions are not read
    return method


def moved(method: Snd) -> Parameters:
    """After a task that moved the weights, and in the middle of the next."""
    generator = torch.Generator().manual_seed(1)

    def elsewhere(factors: Parameters) -> Parameters:
        return {n: torch.randn(p.shape, generator=generator) * 0.3 for n, p in factors.items()}

    factors = trained(method.initial(generator))
    return elsewhere(factors) | keep("before", elsewhere(factors))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_backbone(tmp_path)


def test_the_gate_by_hand() -> None:
    pretrained, before = torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [0.2, 0.0], [0.3, 0.4]])
    expected = torch.sigmoid(torch.tensor([-1.2, 0.0, 1.8]))  # 6 (0 − 0.2), 6 (0.2 − 0.2), 6 (0.5 − 0.2)
    torch.testing.assert_close(gate(pretrained, before), expected)


def test_the_loss_is_the_gated_distance_to_both_teachers(tiny: Path) -> None:
    method = method_of(tiny)
    parameters = moved(method)
    images, _ = method.reference()
    with torch.no_grad():
        frozen = method.backbone.encode_image(images)
        now = method.image_features(images, trained(parameters))
        before = method.image_features(images, {n[7:]: p for n, p in parameters.items() if n.startswith("before/")})
    expected = 0.0
    for f, g, b in zip(frozen, now, before, strict=True):
        own = 1 / (1 + torch.exp(-6 * ((f - b).norm() - 0.2)))
        expected += float(9 * own * (g - b).square().sum() + 0.5 * (1 - own) * (g - f).square().sum()) / 6
    assert expected > 0.01
    assert method.extra_loss(parameters, STEP).item() == pytest.approx(expected, rel=1e-4)


def test_parts_share_the_reference_images(tiny: Path) -> None:
    """Nine parts for six images: some have none. The mean over parts is the loss of one."""
    method = method_of(tiny)
    parameters = moved(method)
    whole = method.extra_loss(parameters, STEP)
    parts = [method.extra_loss(parameters, replace(STEP, part=p, num_parts=9)) for p in range(9)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_the_next_task_has_the_weights_of_this_one_as_a_teacher(tiny: Path) -> None:
    method = method_of(tiny)
    module = method.finish(moved(method), {})
    assert all(method.is_trained(name) for name in module)
    following = method.initial(torch.Generator().manual_seed(2), module)
    assert all(torch.equal(following[f"before/{n}"], p) for n, p in module.items())
