"""Ray Train's controller runs in the process that trains: what is different for its user."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray
from rich.console import Console

from diki_ray.config import Config, load
from diki_ray.runs.continual import run_continual
from diki_ray.store.run_store import RunStore

DEBUG = Path(__file__).parents[2] / "configs" / "debug.yaml"

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_cluster")]


@pytest.fixture
def config(tmp_path: Path, prepared: Path) -> Config:
    """configs/debug.yaml, of one task."""
    whole = load(DEBUG, [f"run.storage={tmp_path}", f"data.root={prepared}"])
    return Config.model_validate(whole.model_dump() | {"tasks": whole.model_dump()["tasks"][:1]})


def run(config: Config) -> dict:
    return run_continual(config, Console(quiet=True))


def modules(config: Config) -> list[str]:
    return [entry.digest for entry in RunStore.open(config.run.storage, config.run.name).modules()]


def besides_workers() -> int:
    """Actors of Ray Train that there are or were on this cluster and that train nothing, nor wait for each other."""
    actors = ray._private.state.actors().values()
    return sum(actor["ActorClassName"] in ("TrainController", "_AutoscalingCoordinatorActor") for actor in actors)


def test_training_starts_workers_alone_but_in_an_event_loop(config: Config, tmp_path: Path) -> None:
    before = besides_workers()
    run(config)
    assert besides_workers() == before
    inside = config.model_copy(update={"run": config.run.model_copy(update={"storage": str(tmp_path / "inside")})})

    async def cell() -> None:  # a cell of a notebook is run so
        run(inside)

    asyncio.run(cell())
    assert besides_workers() > before
    assert modules(inside) == modules(config) != []


def test_training_that_is_interrupted_leaves_nothing_behind(config: Config) -> None:
    def training() -> int:
        groups = ray.util.placement_group_table().values()
        return sum(group["state"] == "CREATED" for group in groups)

    def interrupt() -> None:
        while not training():
            time.sleep(0.05)
        time.sleep(2)  # the workers start
        os.kill(os.getpid(), signal.SIGINT)

    total = ray.cluster_resources()["CPU"]
    endless = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 100_000})})
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # in several processes pytest's ignore it
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(endless)
    finally:
        signal.signal(signal.SIGINT, former)
    until = time.monotonic() + 20
    while (training() or ray.available_resources().get("CPU", 0) < total) and time.monotonic() < until:
        time.sleep(0.1)
    assert training() == 0
    assert ray.available_resources()["CPU"] == total
    assert run(config)["trained"] == ["digits"]
