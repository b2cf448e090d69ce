"""A module's bytes, key and seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from golden import Golden

from diki_ray.errors import ConfigError, CorruptError
from diki_ray.learning.module import TaskModule, module_key, task_seed
from diki_ray.learning.moments import Moments
from diki_ray.learning.statistics import Statistics

MODULE = Golden.load().module(0)


def test_bytes_come_back_and_are_the_same_every_time() -> None:
    blob = MODULE.to_bytes()
    back = TaskModule.from_bytes(blob)
    assert blob == back.to_bytes()
    assert (back.key, back.task, back.class_names, back.templates) == (
        MODULE.key,
        MODULE.task,
        MODULE.class_names,
        MODULE.templates,
    )
    assert all(np.array_equal(back.parameters[n], p) for n, p in MODULE.parameters.items())
    reordered = replace(MODULE, parameters=dict(reversed(MODULE.parameters.items())))
    assert reordered.to_bytes() == blob


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"\x80\x04" + b, lambda b: b[8:]])
def test_bytes_that_are_no_module_are_corrupt(damage) -> None:
    with pytest.raises(CorruptError):
        TaskModule.from_bytes(damage(MODULE.to_bytes()))


def test_one_task_of_vit_b_16_takes_at_most_1_8_megabytes() -> None:
    rng = np.random.default_rng(0)
    tensors = {f"image.layer{i}.{n}": (8, 768) for i in range(8) for n in ("keys", "values")}
    tensors |= {f"text.layer{i}.{n}": (8, 512) for i in range(8) for n in ("keys", "values")}
    module = TaskModule(
        key="0" * 64,
        task="sun397",
        class_names=tuple(f"a class name {i}" for i in range(397)),
        templates=("a photo of a {}.",),
        method="diki",
        parameters={n: rng.normal(size=s).astype(np.float32) for n, s in tensors.items()},
        moments=Moments.of(rng.normal(size=(600, 512))),
        validation_features=rng.normal(size=(64, 512)),
    )
    assert len(module.to_bytes()) <= 1_800_000


def test_one_task_of_vit_b_16_with_a_hundred_class_means_takes_at_most_1_9_megabytes() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20_000, 512))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    statistics = Statistics.of(features, rng.integers(0, 100, len(features)), 100)
    module = TaskModule(
        key="0" * 64,
        task="caltech101",
        class_names=tuple(f"a class name {i}" for i in range(100)),
        templates=("a photo of a {}.",),
        method="diki",
        parameters={"prompts": np.zeros(163_840, np.float32)},
        moments=statistics.moments,
        validation_features=rng.normal(size=(64, 512)),
        statistics=statistics,
    )
    blob = module.to_bytes()
    assert len(blob) <= 1_900_000
    back = TaskModule.from_bytes(blob)
    assert np.array_equal(back.class_statistics.first, statistics.first)
    assert np.array_equal(back.moments.scatter, module.moments.scatter)
    assert back.to_bytes() == blob


def test_a_module_of_the_former_version_is_read_and_says_that_it_lacks_class_means() -> None:
    former = TaskModule.from_bytes(MODULE.to_bytes())
    with pytest.raises(ConfigError, match=r"no class means.*diki-ray store fill"):
        _ = former.class_statistics


def test_keys_and_seeds_depend_on_values_and_not_on_order() -> None:
    assert module_key(a=1, b=(2, 3)) == module_key(b=[2, 3], a=1)
    assert module_key(a=1, b=2) != module_key(a=1, b=3)
    assert task_seed(0, "x") == task_seed(0, "x") != task_seed(1, "x")
    assert 0 <= task_seed(0, "x") < 2**63
