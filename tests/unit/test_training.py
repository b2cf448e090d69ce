"""Training is the same for any number of workers, resumable bit for bit, and never steps on what is not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from golden import Golden, golden_trainer
from processes import run_ranks

from diki_ray.learning import collective
from diki_ray.learning.collective import own_parts
from diki_ray.learning.task_trainer import NonFiniteError, Recipe, TaskTrainer, cosine_lr

GOLDEN = Golden.load()


NUM_PARTS = 6
"""For 5 classes and batches of 16: a part has no class, and parts are uneven."""
WORLD_SIZES = (2, 3, 4, 6)


def train_golden_with_each_number_of_workers(rank: int, folder: str) -> None:
    """One process takes part in the groups it is needed for, one after the other: starting it is what costs."""
    torch.set_num_threads(1)
    golden = Golden.load()
    for world_size in WORLD_SIZES:
        if rank < world_size:
            train_golden(golden, rank, world_size, folder)


def train_golden(golden: Golden, rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/group{world_size}", world_size=world_size, rank=rank)
    run = golden_run(golden, golden_trainer(golden, num_parts=NUM_PARTS))
    if rank == 0:
        torch.save(run, f"{folder}/{world_size}.pt")
    dist.destroy_process_group()


def golden_run(golden: Golden, trainer: TaskTrainer) -> dict[str, Any]:
    """Losses and parameters of all steps; image n of a batch is in part n modulo the number of parts."""
    parts, losses = trainer.num_parts, []
    for _ in range(golden.meta["epochs"]):
        for images, labels in golden.train_batches(0):
            batch = [(images[part::parts], labels[part::parts]) for part in own_parts(parts)]
            losses.append(trainer.step_in_parts(batch).loss)
    return {"losses": losses, "parameters": {n: p.detach() for n, p in trainer.parameters.items()}}


def test_the_trained_module_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    """1, 2, 3, 4 and 6 workers over the golden steps in 6 parts: equal to the bit, and to 1e-5 of one part."""
    run_ranks(train_golden_with_each_number_of_workers, str(tmp_path), num_ranks=max(WORLD_SIZES))
    alone = golden_run(GOLDEN, golden_trainer(GOLDEN, num_parts=NUM_PARTS))
    whole = golden_run(GOLDEN, golden_trainer(GOLDEN))
    np.testing.assert_allclose(alone["losses"], whole["losses"], atol=1e-5)
    for name, expected in whole["parameters"].items():
        torch.testing.assert_close(alone["parameters"][name], expected, atol=1e-5, rtol=0)
    for world_size in WORLD_SIZES:
        run = torch.load(tmp_path / f"{world_size}.pt", weights_only=True)
        assert run["losses"] == alone["losses"]
        for name, expected in alone["parameters"].items():
            assert torch.equal(run["parameters"][name], expected), f"{name} with {world_size} workers"


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
