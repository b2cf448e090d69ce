"""RAIL: recursive ridge regression, whose statistics know no order, and whose fallback is zero-shot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from tiny_backbone import write_tiny_backbone

from diki_ray.clip.backbone import Backbone, load
from diki_ray.learning.methods import Rail, TrainingBatch
from diki_ray.learning.module import TaskModule
from diki_ray.learning.moments import Moments
from diki_ray.runs.train.assembly import Sums

RIDGE = 0.1


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load(str(write_tiny_backbone(tmp_path_factory.mktemp("backbone"))))


@pytest.fixture(scope="module")
def rail(backbone: Backbone) -> Rail:
    return Rail(backbone, hidden_dim=64, ridge=RIDGE, fusion=0.9, projection_seed=0)


NAMES = {"a": ("cat", "dog", "fox"), "b": ("red", "blue"), "c": ("cat", "owl")}
"""The classes of three tasks; two have a `cat`."""


def batch_of(task: str, num_images: int = 40) -> TrainingBatch:
    generator = torch.Generator().manual_seed(ord(task))
    features = torch.nn.functional.normalize(torch.randn(num_images, 32, generator=generator), dim=1)
    labels = torch.randint(len(NAMES[task]), (num_images,), generator=generator)
    return TrainingBatch(torch.zeros(num_images, 3, 1, 1), labels, features, torch.zeros(len(NAMES[task]), 1))


def part_of(batch: TrainingBatch, rows: slice) -> TrainingBatch:
    return TrainingBatch(batch.images[rows], batch.labels[rows], batch.features[rows], batch.class_tokens)


def summed(rail: Rail, batch: TrainingBatch, ranks: list[list[slice]]) -> dict[str, torch.Tensor]:
    """Sums over the batches of each rank, then over ranks, as the trainer makes them."""
    merged = Sums()
    for slices in ranks:
        own = Sums()
        for rows in slices:
            own.add(rail.sums({}, part_of(batch, rows)))
        merged.add(own.tensors)
    return merged.tensors


def module_of(rail: Rail, task: str) -> TaskModule:
    sums = summed(rail, batch_of(task), [[slice(0, 40)]])
    parameters = {name: tensor.numpy() for name, tensor in rail.finish({}, sums).items()}
    return TaskModule(task, task, NAMES[task], ("{}",), "rail", parameters, Moments.empty(32), np.zeros((0, 32)))


def together(rail: Rail, tasks: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Random features, one-hot labels by class name, and the names, of all tasks at once."""
    names = sorted({name for t in tasks for name in NAMES[t]})
    phi = torch.cat([rail.expanded(batch_of(t).features) for t in tasks]).numpy()
    labels = [names.index(NAMES[t][c]) for t in tasks for c in batch_of(t).labels]
    return phi, np.eye(len(names))[labels], names


def test_the_statistics_are_the_same_however_images_are_shared_out(rail: Rail) -> None:
    batch = batch_of("a")
    one = summed(rail, batch, [[slice(0, 40)]])
    for ranks in (
        [[slice(0, 16), slice(16, 40)]],
        [[slice(0, 7)], [slice(7, 21), slice(21, 40)]],
        [[slice(33, 40), slice(0, 20)], [], [slice(20, 33)]],
    ):
        other = summed(rail, batch, ranks)
        for name, tensor in one.items():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(other[name], tensor, rtol=1e-13, atol=1e-13)


def test_the_regression_is_the_same_to_the_last_bit_in_every_order(rail: Rail) -> None:
    learnt_modules = {t: module_of(rail, t) for t in "abc"}
    given = rail.join([learnt_modules[t] for t in "abc"])
    for order in ("cab", "bca", "cba"):
        turned = rail.join([learnt_modules[t] for t in order])
        assert turned.columns == given.columns
        assert torch.equal(turned.weights, given.weights)


def test_the_closed_form_is_ridge_regression_on_all_data_at_once(rail: Rail) -> None:
    joined = rail.join([module_of(rail, t) for t in "abc"])
    phi, labels, names = together(rail, "abc")
    assert list(joined.columns) == names
    expected = Ridge(alpha=RIDGE, fit_intercept=False, solver="cholesky").fit(phi, labels).coef_.T
    np.testing.assert_allclose(joined.weights.numpy(), expected, rtol=1e-8, atol=1e-8)


def test_the_closed_form_is_the_papers_recursion_over_tasks(rail: Rail) -> None:
    inverse, names = np.eye(64) / RIDGE, together(rail, "abc")[2]
    weights = np.zeros((64, len(names)))
    for t in "abc":
        phi = rail.expanded(batch_of(t).features).numpy()
        labels = np.eye(len(names))[[names.index(NAMES[t][c]) for c in batch_of(t).labels]]
        inverse -= inverse @ phi.T @ np.linalg.solve(np.eye(len(phi)) + phi @ inverse @ phi.T, phi @ inverse)
        weights += inverse @ phi.T @ (labels - phi @ weights)
    joined = rail.join([module_of(rail, t) for t in "abc"])
    np.testing.assert_allclose(joined.weights.numpy(), weights, rtol=1e-8, atol=1e-8)


def test_only_images_that_zero_shot_gives_to_a_learnt_class_are_answered_by_the_regression(rail: Rail) -> None:
    joined = rail.join([module_of(rail, "a")])
    names = ("cat", "dog", "owl")  # an owl was not learnt
    zero_shot = torch.tensor([[5.0, 1.0, 0.0], [1.0, 2.0, 4.0]])
    features = batch_of("a").features[:2]
    logits = rail.joint_logits(joined, features, zero_shot, names)
    assert torch.equal(logits[1], zero_shot[1])
    regressed = (rail.expanded(features[:1]) @ joined.weights)[0]
    columns = [joined.columns["cat"], joined.columns["dog"]]
    expected = 0.1 * zero_shot[0].softmax(0) + 0.9 * torch.tensor([*regressed[columns].tolist(), 0.0])
    scale = rail.backbone.model.logit_scale.exp()
    torch.testing.assert_close(logits[0], scale * expected, rtol=1e-5, atol=1e-5)
