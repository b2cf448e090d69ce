"""Sweeps on a real local cluster: modules trained once, orders by indexing, failures shown, repetition free."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from diki_ray.config import Config, load
from diki_ray.model.metrics import Metrics
from diki_ray.runtime.continual import run_continual
from diki_ray.runtime.plan import load_backbone, make_plan
from diki_ray.runtime.sweep import Results, matrices_of_orders, modules_of, run_sweep
from diki_ray.sweep_config import SweepConfig, orders_of

DEBUG = Path(__file__).parent.parent.parent / "configs" / "debug.yaml"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    storage = tmp_path_factory.mktemp("sweep")
    base = load(DEBUG, [f"run.storage={storage}", f"data.root={storage}/prepared"])
    tree = base.model_dump()
    tree["tasks"] = [*tree["tasks"], {"data": "embedded:mist", "shots": 4}]
    return Config.model_validate(tree)


def test_a_sweep_trains_each_module_once_and_judges_every_order(config: Config, local_cluster: None) -> None:
    sweep = SweepConfig.model_validate(
        {
            "name": "s",
            "base": "debug.yaml",
            "parameters": {"calibration.bias": [-1.0, 1.0], "method.image_depth": [2, 99]},
            "orders": {"all": True},
            "max_failures": 0,
            "concurrent_trials": 2,
        }
    )
    document = run_sweep(sweep, config)
    assert len(document["orders"]) == 6
    assert document["modules_trained"] == 3  # for two calibrations, six orders, and by two trials at the same time
    failed = [t for t in document["trials"] if t["error"]]
    assert [t["setting"]["method.image_depth"] for t in failed] == [99, 99]
    assert all("99 blocks" in t["error"] for t in failed)
    good = [t for t in document["trials"] if not t["error"]]
    assert len(good) == 2
    best = max(t["validation"]["objective"]["mean"] for t in good)
    assert document["chosen"]["validation"]["objective"]["mean"] == best
    assert document["chosen"]["test"]["last"]["mean"] is not None

    again = run_sweep(sweep, config)
    assert again["modules_trained"] == 0
    assert again["chosen"] == document["chosen"]


def test_every_orders_matrix_is_the_direct_evaluations(config: Config, local_cluster: None) -> None:
    plan = make_plan(config, load_backbone(config))
    results = Results(config.run.storage, "direct")
    digests = modules_of(plan, results)
    orders = orders_of(SweepConfig(name="x", base="x", orders={"all": True}).orders, [t.name for t in plan.tasks])
    matrices = matrices_of_orders(plan, digests, orders, "test", results)
    for name in ("given", "2-0-1", "1-2-0"):
        order = orders[name]
        tree = config.model_dump()
        tree["tasks"] = [tree["tasks"][t] for t in order]
        tree["run"]["name"] = f"order-{name}"
        direct = run_continual(Config.model_validate(tree), Console(quiet=True))
        assert direct["trained"] == []  # the library has every module
        accuracy, zero_shot = matrices[name]
        np.testing.assert_allclose(accuracy, direct["accuracy"], atol=1e-6)
        np.testing.assert_allclose(zero_shot, direct["zero_shot"], atol=1e-6)
        last = Metrics.of(accuracy).mean("last")
        assert abs(last - direct["metrics"]["last"]["mean"]) < 1e-6
