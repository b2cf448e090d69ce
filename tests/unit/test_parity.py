"""Parity with the authors' public code: every group of tensors in the golden file, through the project's own classes,
at the tolerances of method.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import Golden

from diki_ray.answering.class_features import Candidates, Exact
from diki_ray.answering.gaussians import Gaussians
from diki_ray.answering.predictor import Predictor
from diki_ray.answering.routing import GaussianRouter, Published
from diki_ray.learning.moments import Moments
from diki_ray.learning.task_trainer import Recipe, TaskTrainer

GOLDEN = Golden.load()
TASKS = range(GOLDEN.num_tasks)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    meta = GOLDEN.meta
    modules = [GOLDEN.module(t) for t in TASKS]
    gaussians = Gaussians([m.moments for m in modules], eps=meta["covariance_eps"])
    calibration = Published(meta["calibration_scale"], meta["calibration_bias"])
    return Predictor(GOLDEN.method, modules, GaussianRouter(gaussians, calibration), Exact())


def candidates(task: int) -> Candidates:
    template, names = GOLDEN.meta["tasks"][task]
    return Candidates.of(GOLDEN.backbone, names, [template])


def assert_close(actual: object, expected: torch.Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64), expected.double(), atol=atol, rtol=rtol, check_dtype=False
    )


@pytest.mark.parametrize("task", TASKS)
def test_tokens_and_zero_shot_text_features(task: int) -> None:
    template, names = GOLDEN.meta["tasks"][task]
    tokens = GOLDEN.backbone.tokenize(names, template)
    assert torch.equal(tokens, GOLDEN[f"task{task}.tokens"])
    assert_close(GOLDEN.backbone.encode_text(tokens), GOLDEN[f"task{task}.zero_shot.text_features"], 1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_frozen_features_mean_and_covariance(task: int) -> None:
    features = GOLDEN.backbone.encode_image(GOLDEN[f"task{task}.train.images"])
    assert_close(features, GOLDEN[f"task{task}.frozen_features"], 1e-5)
    first, rest = features[:20], features[20:]
    moments = Moments.of(rest).merge(Moments.of(first))
    assert_close(moments.mean, GOLDEN[f"task{task}.mean"], 1e-5)
    assert_close(moments.covariance(GOLDEN.meta["covariance_eps"]), GOLDEN[f"task{task}.covariance"], 1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_losses_and_trained_prompts(task: int) -> None:
    meta, batches = GOLDEN.meta, GOLDEN.train_batches(task)
    recipe = Recipe(lr=meta["lr"], final_lr_fraction=meta["lr_final"] / meta["lr"])
    num_steps = meta["epochs"] * len(batches)
    trainer = TaskTrainer(GOLDEN.method, GOLDEN[f"task{task}.tokens"], recipe, num_steps, GOLDEN.prompts("init", task))
    losses = [trainer.step(images, labels).loss for _ in range(meta["epochs"]) for images, labels in batches]
    assert_close(losses, GOLDEN[f"task{task}.train.losses"], 1e-5)
    expected = GOLDEN.prompts("trained", task)
    assert trainer.parameters.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(trainer.parameters[name].detach(), value, 1e-5)


def test_log_densities(predictor: Predictor) -> None:
    images = torch.cat([GOLDEN[f"task{t}.test.images"] for t in TASKS])
    scores = predictor.scores(predictor.frozen_features(images))
    assert_close(scores.log_density, GOLDEN["eval.log_density"], atol=0, rtol=1e-4)


@pytest.mark.parametrize("learnt", range(1, GOLDEN.num_tasks + 1))
@pytest.mark.parametrize("task", TASKS)
def test_both_routings_after_each_task(predictor: Predictor, learnt: int, task: int) -> None:
    images, labels = GOLDEN[f"task{task}.test.images"], GOLDEN[f"task{task}.test.labels"]
    frozen = predictor.frozen_features(images)
    scores = predictor.scores(frozen, range(learnt))
    expected = f"eval.learnt{learnt}.task{task}"

    batch = predictor.routes(scores, "batch")
    assert batch.task.unique().tolist() == [int(GOLDEN[f"{expected}.batch.majority"])]
    assert_close(batch.text_weight[0], GOLDEN[f"{expected}.batch.text_weight"], 1e-5)
    logits = predictor.logits(images, frozen, batch, candidates(task))
    assert_close(logits, GOLDEN[f"{expected}.batch.logits"], 1e-4)
    accuracy = (logits.argmax(1) == labels).double().mean()
    assert_close(accuracy, GOLDEN["eval.accuracy"][learnt - 1, task], 1e-7)

    image = predictor.routes(scores, "image")
    assert torch.equal(image.task, GOLDEN[f"{expected}.image.routed"])
    assert_close(image.weight, GOLDEN[f"{expected}.image.weight"], 1e-5)
    logits = predictor.logits(images, frozen, image, candidates(task))
    assert_close(logits, GOLDEN[f"{expected}.image.logits"], 1e-4)


def test_the_file_holds_what_its_readme_lists() -> None:
    """A golden file in which a group is missing would pass the loops above unseen."""
    assert GOLDEN.num_tasks >= 2
    assert GOLDEN["eval.accuracy"].shape == (GOLDEN.num_tasks, GOLDEN.num_tasks)
    assert len(GOLDEN.prompts("trained", 0)) == 2 * (
        GOLDEN.meta["prompt_depth_vision"] + GOLDEN.meta["prompt_depth_text"]
    )
    assert np.isfinite(GOLDEN["eval.log_density"].numpy()).all()
