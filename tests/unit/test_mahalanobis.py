"""A metric for each class: its scores, what passes from domain to domain, and who is answered by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_backbone import write_tiny_backbone

from diki_ray.clip.backbone import Backbone, load
from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods import Mahalanobis, Step, TrainingBatch
from diki_ray.learning.methods.base import OwnImages
from diki_ray.learning.methods.mahalanobis import _within, scores
from diki_ray.learning.module import TaskModule
from diki_ray.learning.moments import Moments

NAMES = ("ruby", "pearl")
TOKENS = torch.zeros(2, 4, dtype=torch.long)


@pytest.fixture
def backbone(tmp_path: Path) -> Backbone:
    return load(str(write_tiny_backbone(tmp_path)))


def method_of(backbone: Backbone, **settings: Any) -> Mahalanobis:
    return Mahalanobis(backbone, **({"rank": 2, "distillation": 1.5, "average_decay": 0.75, "fusion": 1.0} | settings))


def features_of(backbone: Backbone, seed: int, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Forty images a class around means that are apart, all moved along one axis."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(80) % 2
    x = 0.1 * torch.randn(80, backbone.embed_dim, generator=generator)
    x[:, 0] += torch.where(labels == 0, 0.5, -0.5)
    x[:, 1] += shift
    return x, labels


def begun(method: Mahalanobis, seed: int = 0, shift: float = 0.0, before: TaskModule | None = None) -> Parameters:
    x, labels = features_of(method.backbone, seed, shift)
    start = method.starting(torch.Generator().manual_seed(seed), NAMES, before)
    sums = method.first_sums(start, TrainingBatch(torch.zeros(80, 3, 1, 1), labels, x, TOKENS))
    begun = method.begin(start, sums, TOKENS)
    return {n: begun[n].to(p.dtype) for n, p in start.items()}


def module_of(parameters: Parameters, names: tuple[str, ...] = NAMES) -> TaskModule:
    arrays = {n: p.numpy() for n, p in parameters.items()}
    return TaskModule("key", "task", names, ("a {}.",), "mahalanobis", arrays, Moments.empty(2), np.zeros((0, 2)))


def test_the_scores_by_hand() -> None:
    z = torch.tensor([[1.0, 2.0]])
    parameters = {
        "mean": torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
        "low_rank": torch.tensor([[[1.0, 1.0]], [[0.0, 2.0]]]),
        "bias": torch.tensor([0.25, 0.0]),
        "log_scale": torch.tensor(0.5).log(),
    }
    # ‖(1, 2)‖² + (1 + 2)² = 14; ‖(0, 1)‖² + (2 · 1)² = 5
    torch.testing.assert_close(scores(z, parameters), torch.tensor([[0.25 - 0.25 * 14, -0.25 * 5]]))


def test_a_task_starts_as_linear_discriminant_analysis(backbone: Backbone) -> None:
    method = method_of(backbone)
    x, labels = features_of(backbone, 0)
    parameters = begun(method)
    parameters["low_rank"].zero_()
    means = torch.stack([x[labels == c].mean(0) for c in range(2)]).double()
    off = x.double() - means[labels]
    covariance = Moments(80, np.zeros(backbone.embed_dim), (off.T @ off).numpy()).covariance(1e-7, "oas")
    inverse = torch.from_numpy(np.linalg.inv(covariance))
    scale = 3 / backbone.embed_dim**0.5
    for n in range(3):
        expected = [-scale / 2 * float((x[n] - m) @ inverse @ (x[n] - m)) for m in means]
        found = method.logits(x[n : n + 1], torch.zeros(2, backbone.embed_dim), parameters)[0]
        assert found.tolist() == pytest.approx(expected, rel=1e-3)


def test_the_metric_of_a_class_goes_on_in_the_next_domain_whatever_the_coordinates(backbone: Backbone) -> None:
    """Seen in features, the teacher and the directions are where they were, and a class's mean is moved by its new
    images: the coordinates alone have changed."""
    method = method_of(backbone)
    first = begun(method)
    first["mean"] += torch.randn(first["mean"].shape, generator=torch.Generator().manual_seed(5)) * 0.3
    first["bias"] += torch.tensor([0.5, -0.5])
    second = begun(method, seed=1, shift=0.4, before=module_of(first))
    assert torch.equal(second["bias"], first["bias"])
    # the teacher's mean is where it was, in features
    for name in ("teacher/mean", "teacher/low_rank"):
        assert not torch.allclose(second[name], first[name], atol=1e-2)
    there = first["teacher/mean"].double() @ torch.linalg.inv(first["shared/whiten"])
    torch.testing.assert_close(second["teacher/mean"].double() @ torch.linalg.inv(second["shared/whiten"]), there)
    x = features_of(backbone, 3)[0].double()
    along = [
        torch.einsum("be,cre->bcr", x @ p["shared/whiten"], p["teacher/low_rank"].double()) for p in (first, second)
    ]
    torch.testing.assert_close(along[1], along[0], rtol=1e-3, atol=1e-3)
    # the student's is half-way to the mean of as many new images
    own, labels = features_of(backbone, 1, 0.4)
    new = torch.stack([own[labels == c].mean(0) for c in range(2)]).double()
    old = first["mean"].double() @ torch.linalg.inv(first["shared/whiten"])
    found = second["mean"].double() @ torch.linalg.inv(second["shared/whiten"])
    torch.testing.assert_close(found, (old + new) / 2, rtol=1e-4, atol=1e-4)


def test_a_direction_in_which_classes_move_between_domains_counts_for_less(backbone: Backbone) -> None:
    method = method_of(backbone)
    first = begun(method)
    second = begun(method, seed=1, shift=0.6, before=module_of(first))
    weight = [(p["shared/whiten"][1] ** 2).sum().item() for p in (first, second)]  # of the axis of the shift
    assert weight[1] < 0.3 * weight[0]
    assert second["sums/count"].tolist() == [80, 80]


def test_where_no_class_has_a_second_image_the_covariance_is_half_of_the_whole_scatter() -> None:
    images = torch.tensor([[4.0, 1.0], [-2.0, 1.0], [2.0, 1.0], [0.0, 1.0]]).double()
    sums = {"count": torch.ones(4), "first": images, "second": images.T @ images, "num": torch.tensor(4)}
    # About their mean (1, 1): [[20, 0], [0, 0]]; half of it over four images: [[2.5, 0], [0, 0]], of mean 1.25.
    # OAS: α = μ² = 1.25², so the share of 1.25 I is (α + μ²) / (5 (α − μ²/2)) = 0.8.
    expected = torch.diag(torch.tensor([0.2 * 2.5 + 0.8 * 1.25, 0.8 * 1.25])).double()
    torch.testing.assert_close(_within(sums), expected, rtol=0, atol=1e-6)


def test_classes_that_are_gone_leave_their_scatter_and_no_rows(backbone: Backbone) -> None:
    method = method_of(backbone)
    first = begun(method)
    start = method.starting(torch.Generator().manual_seed(1), ("opal", "ruby"), module_of(first))
    assert start["sums/count"].tolist() == [0, 40]
    torch.testing.assert_close(start["mean"][1], first["mean"][0])
    left = start["sums/second"] - torch.outer(start["sums/first"][1], start["sums/first"][1]) / 40
    both = first["sums/second"] - sum(torch.outer(f, f) / 40 for f in first["sums/first"])
    torch.testing.assert_close(left, both)


def test_the_teacher_is_a_moving_average_and_its_answers_are_held_to(backbone: Backbone) -> None:
    method, step = method_of(backbone), Step(0, 10, 0.1, 7)
    parameters = begun(method)
    parameters["bias"] = torch.tensor([1.0, 0.0])
    x, labels = features_of(backbone, 2)
    texts = torch.zeros(2, backbone.embed_dim)
    student = method.logits(x, texts, parameters).softmax(1)
    teacher = method.logits(x, texts, parameters | {"bias": torch.zeros(2)}).softmax(1)
    expected = 1.5 * (teacher * (teacher / student).log()).sum(1)
    found = method.image_losses(OwnImages(torch.zeros(80, 3, 1, 1), labels, x, texts), parameters, step)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    method.after_step(parameters, {}, step)
    assert parameters["teacher/bias"].tolist() == [0.25, 0.0]


def test_a_class_has_the_metric_of_the_last_task_that_had_it_and_others_keep_zero_shot(backbone: Backbone) -> None:
    method = method_of(backbone)
    first = begun(method)
    second = begun(method, seed=1, shift=0.4, before=module_of(first))
    joined = method.join([module_of(first), module_of(second, ("pearl", "opal"))])
    assert joined.places == {"ruby": (0, 0), "pearl": (1, 0), "opal": (1, 1)}
    x, _ = features_of(backbone, 2)
    names = ("ruby", "cat", "opal")
    zero_shot = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
    found = method.joint_logits(joined, x, zero_shot, names)
    of_cats = zero_shot.argmax(1) == 1
    assert of_cats.any()
    assert torch.equal(found[of_cats], zero_shot[of_cats])
    texts = torch.zeros(2, backbone.embed_dim)
    own = torch.stack([method.logits(x, texts, first)[:, 0], method.logits(x, texts, second)[:, 1]], dim=1)
    expected = backbone.model.logit_scale.exp() * own.softmax(1)
    torch.testing.assert_close(found[~of_cats][:, [0, 2]], expected[~of_cats])
    assert torch.equal(method.joint_logits(joined, x, zero_shot[:, :1], ("cat",)), zero_shot[:, :1])
