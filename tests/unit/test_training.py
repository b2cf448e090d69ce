"""Training is resumable bit for bit, and never steps on what is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from golden import Golden, golden_trainer

from diki_ray.learning import collective
from diki_ray.learning.collective import own_parts
from diki_ray.learning.task_trainer import NonFiniteError, Recipe, cosine_lr

GOLDEN = Golden.load()


def test_more_workers_than_parts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="3 workers cannot share 2 parts"):
        own_parts(2)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resuming_from_saved_state_is_bit_equal(optimizer: str) -> None:
    recipe = Recipe(optimizer=optimizer, lr=5.0 if optimizer == "sgd" else 0.01)  # type: ignore[arg-type]
    batches = GOLDEN.train_batches(0)
    whole = golden_trainer(GOLDEN, recipe)
    for images, labels in batches:
        whole.step(images, labels)
    whole.end_epoch(0, 0.5)

    half = golden_trainer(GOLDEN, recipe)
    for images, labels in batches[:2]:
        half.step(images, labels)
    resumed = golden_trainer(GOLDEN, recipe)
    resumed.load_state(*half.state())
    for images, labels in batches[2:]:
        resumed.step(images, labels)
    resumed.end_epoch(0, 0.5)

    expected, actual = whole.state(), resumed.state()
    assert actual[0] == expected[0]
    assert actual[1].keys() == expected[1].keys()
    for name, array in expected[1].items():
        assert np.array_equal(actual[1][name], array), name


def test_cosine_schedule_by_step() -> None:
    lrs = [cosine_lr(s, 10, 5.0) for s in range(10)]
    assert lrs[0] == 5.0
    assert lrs == sorted(lrs, reverse=True)
    assert lrs[-1] == pytest.approx(0.005 + 0.5 * 4.995 * (1 + math.cos(math.pi * 0.9)))


def test_the_best_epoch_is_kept_and_ties_keep_the_earliest() -> None:
    trainer = golden_trainer(GOLDEN)
    seen = []
    for epoch, accuracy in enumerate([0.5, 0.7, 0.7, 0.6]):
        with torch.no_grad():
            trainer.parameters["image.layer0.values"].fill_(epoch)
        seen.append(trainer.end_epoch(epoch, accuracy))
    assert seen == [True, True, False, False]
    assert trainer.progress.best_epoch == 1
    assert (trainer.best["image.layer0.values"] == 1).all()
    without = golden_trainer(GOLDEN)
    assert [without.end_epoch(e, None) for e in range(3)] == [True, True, True]  # no validation: the last one


def test_what_is_not_finite_makes_no_step_and_three_in_a_row_stop_with_the_keys() -> None:
    trainer = golden_trainer(GOLDEN)
    images, labels = GOLDEN.train_batches(0)[0]
    bad = torch.full_like(images, math.nan)
    before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
    assert not trainer.step(bad, labels, ("a",)).applied
    assert all(torch.equal(before[n], p) for n, p in trainer.parameters.items())
    assert trainer.step(images, labels).applied
    trainer.step(bad, labels, ("b",))
    trainer.step(bad, labels, ("c",))
    with pytest.raises(NonFiniteError, match=r"3 batches in a row.*last batch: seven, eight"):
        trainer.step(bad, labels, ("seven", "eight"))
    assert trainer.num_nonfinite == 4


def test_a_batch_in_which_everything_was_skipped_is_no_step() -> None:
    trainer = golden_trainer(GOLDEN)
    images, labels = GOLDEN.train_batches(0)[0]
    result = trainer.step(images[:0], labels[:0])
    assert (result.applied, result.num_samples) == (False, 0)
    assert trainer.num_nonfinite == 0
