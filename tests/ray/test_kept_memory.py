"""Actors that make one pass of a model after another keep a pass's memory for the next, as counted by the system."""

from __future__ import annotations

import resource
import threading
from typing import Any

import pytest
import ray
import torch

from diki_ray.runs.cluster import keeps_memory
from diki_ray.serving.deployment import deploy
from diki_ray.serving.settings import Settings

VARIABLES = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
PAGES = 100 * 2**20 // 4096


@ray.remote
class Passes:
    def cleared(self) -> int:
        """How many pages the system clears for 100 MB that were taken and freed before, in a thread of its own."""
        counted = list[int]()

        def take() -> None:
            for _ in range(6):  # the first few find their places
                before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
                torch.ones(PAGES * 4096, dtype=torch.uint8)
                counted.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        return counted[-1]


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.cluster
@pytest.mark.usefixtures("nothing_set")
def test_what_a_pass_took_is_there_for_the_next(local_cluster: str) -> None:
    def cleared(**options: Any) -> int:
        actor = Passes.options(num_cpus=0, **options).remote()
        return int(ray.get(actor.cleared.remote()))

    assert cleared(runtime_env=keeps_memory()) < cleared() / 10


@pytest.mark.usefixtures("nothing_set")
def test_what_the_user_has_set_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(keeps_memory()["env_vars"]) == ["GLIBC_TUNABLES"]
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    assert keeps_memory() == {}


@pytest.mark.usefixtures("nothing_set")
def test_a_replica_keeps_it_and_takes_other_options_too() -> None:
    settings = Settings(storage="s", run="r")
    for options in ({}, {"ray_actor_options": {"num_cpus": 3}}):
        (deployment,) = [deploy(settings, **options)._bound_deployment]
        assert deployment.ray_actor_options["runtime_env"] == keeps_memory()
    assert deployment.ray_actor_options["num_cpus"] == 3
