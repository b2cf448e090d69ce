"""A notebook and the platform share a run: the same modules, and each goes on where the other has stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from diki_ray import ContinualModel
from diki_ray.config import Config, load
from diki_ray.runs.continual import run_continual
from diki_ray.store.run_store import RunStore

DEBUG = Path(__file__).parents[2] / "configs" / "debug.yaml"

pytestmark = [pytest.mark.cluster, pytest.mark.long]


def modules(storage: Path) -> dict[str, tuple[str, str]]:
    return {e.task: (e.key, e.digest) for e in RunStore.open(str(storage), "debug").modules()}


def run(config: Config) -> dict[str, Any]:
    return run_continual(config, Console(quiet=True))


def test_a_notebook_and_the_platform_share_a_run(local_cluster: str, tmp_path: Path, prepared: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    config = load(DEBUG, [f"run.storage={there}", f"data.root={prepared}"])
    results = run(config)
    model = ContinualModel("debug", here, config=DEBUG, verbose=False)
    model.learn("embedded:digits", shots=4).learn("embedded:gems", shots=4)
    assert modules(here) == modules(there)
    assert list(model.evaluate().values()) == results["accuracy"][-1]

    gone_on = run(Config.model_validate(model.config.model_dump() | {"train": config.train.model_dump()}))
    assert gone_on["trained"] == []

    on_cluster = ContinualModel("debug", there, address=local_cluster, verbose=False)
    on_cluster.learn("embedded:mist", shots=2)
    model.learn("embedded:mist", shots=2)
    assert modules(there) == modules(here)
    assert on_cluster.evaluate() == model.evaluate()
    assert run(on_cluster.config)["trained"] == []
