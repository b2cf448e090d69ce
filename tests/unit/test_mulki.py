"""MulKI as it is read here: prototypes, two teachers on the task's own images, integrated weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_backbone import write_tiny_backbone
from torch.nn import functional as F

from diki_ray.clip.backbone import load
from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods import Mulki, Step, TrainingBatch
from diki_ray.learning.methods.base import OwnImages
from diki_ray.learning.methods.low_rank import kept, trained
from diki_ray.learning.module import TaskModule
from diki_ray.learning.moments import Moments

STEP = Step(3, 10, 0.1, 5)
NAMES = ("cat", "dog", "owl")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_backbone(tmp_path)


def method_of(path: Path, **settings: Any) -> Mulki:
    values: dict[str, Any] = {"rank": 2, "alpha": 1.0, "image_depth": 1, "text_depth": 1}
    weights = {"alignment": 1.0, "distillation": 1.0, "average_decay": 0.75, "interpolation": 0.4}
    return Mulki(load(str(path)), **(values | weights | settings))


def begun(method: Mulki) -> tuple[Parameters, torch.Tensor, torch.Tensor]:
    """A task after its first pass, with factors that have moved since, from others before; images and labels."""
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.rand(5, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 1, 0])
    tokens = method.backbone.tokenize(NAMES, "a {}.")
    parameters = method.starting(generator, NAMES, None)
    for name, p in trained(parameters).items():
        parameters[f"before/{name}"] = torch.randn(p.shape, generator=generator) * 0.3
    with torch.no_grad():
        batch = TrainingBatch(images, labels, method.backbone.encode_image(images), tokens)
        parameters = method.begin(parameters, method.first_sums(parameters, batch), tokens)
    moved = {n: torch.randn(p.shape, generator=generator) * 0.3 for n, p in trained(parameters).items()}
    return parameters | moved, images, labels


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    p, q = (teacher / 2).softmax(0), (student / 2).softmax(0)
    return 4 * (p * (p / q).log()).sum()


def test_the_loss_by_hand(tiny: Path) -> None:
    method = method_of(tiny, alignment=0.5, distillation=2.0)
    parameters, images, labels = begun(method)
    backbone, tokens = method.backbone, method.backbone.tokenize(NAMES, "a {}.")
    before = kept("before", parameters)
    with torch.no_grad():
        g = method.image_features(images, trained(parameters))
        t = method.text_features(tokens, trained(parameters))
        g0, g1 = backbone.encode_image(images), method.image_features(images, before)
        t0, t1 = backbone.encode_text(tokens), method.text_features(tokens, before)
        found = method.image_losses(OwnImages(images, labels, g, t), parameters, STEP)
    s = backbone.model.logit_scale.exp().item()
    prototypes = torch.stack([F.normalize(g0[labels == c].mean(0), dim=0) for c in range(3)])
    of_texts = F.cross_entropy(s * t @ prototypes.T, torch.arange(3))
    for n in range(5):
        aligned = F.cross_entropy(s * prototypes @ g[n], labels[n]) + of_texts
        share = torch.sigmoid(6 * ((g0[n] - g1[n]).norm() - 0.2))
        relations = sum(
            weight * (divergence(s * prototypes @ k[n], s * prototypes @ g[n]) + divergence(s * u @ k[n], s * t @ g[n]))
            for weight, k, u in ((1 - share, g0, t0), (share, g1, t1))
        )
        assert found[n].item() == pytest.approx((0.5 * aligned + 2 * relations).item(), rel=1e-3)


def test_weights_are_averaged_within_a_task_and_interpolated_after_it(tiny: Path) -> None:
    method = method_of(tiny)
    name = "image.layer0.q_up"
    parameters = method.starting(torch.Generator().manual_seed(0), NAMES, None)
    parameters[f"before/{name}"].fill_(2.0)
    parameters[f"average/{name}"].fill_(2.0)
    for value in (6.0, 10.0):
        parameters[name] = torch.full_like(parameters[name], value)
        method.after_step(parameters, {}, STEP)
    average = 0.75 * (0.75 * 2 + 0.25 * 6) + 0.25 * 10  # 4.75
    assert parameters[f"average/{name}"].unique().tolist() == pytest.approx([average])
    integrated = 2 + 0.4 * (average - 2)
    assert method.effective(parameters)[name].unique().tolist() == pytest.approx([integrated])
    assert method.effective(parameters, STEP)[name].unique().tolist() == [10.0]
    module = method.finish(parameters, {})
    assert module[name].unique().tolist() == pytest.approx([integrated])
    assert all(method.is_trained(n) for n in module)
    assert all(torch.equal(p, module[n]) for n, p in method.effective(module).items())


def test_the_next_task_starts_from_the_integrated_weights_of_this_one(tiny: Path) -> None:
    method = method_of(tiny)
    factors = method.finish(begun(method)[0], {})
    arrays = {name: p.numpy() for name, p in factors.items()}
    module = TaskModule("key", "task", NAMES, ("a {}.",), "mulki", arrays, Moments.empty(2), np.zeros((0, 2)))
    following = method.starting(torch.Generator().manual_seed(2), ("sun", "moon"), module)
    assert trained(following).keys() == factors.keys()
    for name, p in factors.items():
        assert p.abs().max() > 0
        assert all(torch.equal(following[kind + name], p) for kind in ("", "before/", "average/"))
