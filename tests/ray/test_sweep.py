"""Sweeps on a real local cluster: modules trained once, orders by indexing, failures shown, repetition free."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pyarrow import parquet
from rich.console import Console

from diki_ray.answering.figures import report
from diki_ray.answering.metrics import Metrics
from diki_ray.config import Config, load, parse
from diki_ray.config.sweep import SweepConfig, orders_of, varied
from diki_ray.runs.continual import run_continual
from diki_ray.runs.evaluate.stored import Asked, evaluate_stored
from diki_ray.runs.plan import load_backbone, make_plan
from diki_ray.runs.sweep.sweep import run_sweep
from diki_ray.runs.sweep.trial import evaluated, figures_of, modules_of

DEBUG = Path(__file__).parent.parent.parent / "configs" / "debug.yaml"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Config:
    """Four tasks, two of them alike."""
    places = [f"run.storage={tmp_path_factory.mktemp('sweep')}", f"data.root={prepared}", "evaluate.text_grid=3"]
    tree = load(DEBUG, places).model_dump()
    tree["tasks"] = [{"data": f"embedded:{n}", "shots": 4} for n in ("digits", "gems", "mist", "flags")]
    return Config.model_validate(tree)


def swept(config: Config, said: list[str], **fields: Any) -> dict[str, Any]:
    sweep = SweepConfig.model_validate({"name": "s", "base": "debug.yaml", "max_failures": 0} | fields)
    return run_sweep(sweep, config, lambda text: said.append(text))


TWENTY = {
    "parameters": {"calibration.bias": [-1.0, 1.0], "method.image_depth": [2, 99]},
    "orders": {"num_random": 19},
    "concurrent_trials": 2,
}


@pytest.fixture(scope="module")
def twenty(config: Config, local_cluster: str) -> tuple[dict[str, Any], list[str]]:
    """A sweep over twenty orders, half of whose settings cannot be trained, and what it said."""
    return swept(config, said := [], **TWENTY), said


def test_twenty_orders_train_the_modules_of_one(config: Config, twenty: tuple[dict[str, Any], list[str]]) -> None:
    document, said = twenty
    folder = Path(config.run.storage, "sweeps", "s")
    assert len(document["orders"]) == 20
    assert document["modules_trained"] == 4  # for two calibrations, twenty orders, and by two trials at the same time
    failed = [t for t in document["trials"] if t["error"]]
    assert [t["setting"]["method.image_depth"] for t in failed] == [99, 99]
    assert all("99 blocks" in t["error"] for t in failed)
    good = [t for t in document["trials"] if t["validation"]]
    assert [len(t["validation"]["values"]) for t in good] == [20, 20]
    assert all(t["validation"]["orders_by"] == "indexing" for t in good)
    chosen = document["chosen"]
    assert chosen["validation"]["objective"]["mean"] == max(t["validation"]["objective"]["mean"] for t in good)
    transfers = [v["transfer"] for v in chosen["test"]["values"]]
    assert chosen["test"]["transfer"]["mean"] == pytest.approx(np.mean(transfers))
    assert chosen["test"]["transfer"]["std"] == pytest.approx(np.std(transfers, ddof=1))
    assert sum(line.startswith("[") for line in said) == 4

    with open(folder / "values.csv") as file:
        rows = list(csv.DictReader(file))
    assert sorted({r["split"] for r in rows}) == ["test", "val"]
    assert len(rows) == 3 * 20
    settings = parquet.read_table(folder / "settings.parquet").to_pylist()
    assert [r["chosen"] for r in settings] == [t["setting"] == chosen["setting"] for t in document["trials"]]
    assert "99 blocks" in settings[1]["error"]
    page = (folder / "report.html").read_text()
    assert "Plotly.newPlot" in page
    assert "https://cdn" not in page.split("<body>")[1]


@pytest.mark.long
def test_the_chosen_run_trains_nothing_and_the_same_sweep_neither(
    config: Config, twenty: tuple[dict[str, Any], list[str]]
) -> None:
    folder, chosen = Path(config.run.storage, "sweeps", "s"), twenty[0]["chosen"]
    winner = parse(yaml.safe_load((folder / "chosen.yaml").read_text()))
    results = run_continual(winner, Console(quiet=True))
    assert results["trained"] == []
    given = next(v for v in chosen["test"]["values"] if v["order"] == "given")
    assert results["metrics"]["last"]["mean"] == pytest.approx(given["last"], abs=1e-6)

    swept(config, said := [], **TWENTY | {"parameters": {"calibration.bias": [-1.0, 1.0], "method.image_depth": [2]}})
    assert said[0] == "known already: 2 of 2 settings"
    assert not any(line.startswith("[") for line in said)


@pytest.mark.long
def test_every_orders_matrix_is_the_direct_evaluations(config: Config, local_cluster: str) -> None:
    """Number by number: the accuracies, zero-shot and the weight's AUROC, at both routings."""
    config = config.model_copy(update={"tasks": config.tasks[:3]})
    direct = run_continual(config, Console(quiet=True))  # by the evaluator's actors
    names = [t["name"] for t in direct["tasks"]]
    orders = orders_of(SweepConfig(name="x", base="x", orders={"num_random": 1, "seed": 3}).orders, names)
    for routing in ("image", "batch"):
        plan = make_plan(varied(config, {"evaluate.routing": routing}), load_backbone(config))
        found = evaluated(plan, modules_of(plan), list(orders.values()), "test")
        if routing == "image":
            np.testing.assert_allclose(found.accuracy(orders["given"]), direct["accuracy"], atol=1e-6)
            np.testing.assert_allclose(found.zero_shot(orders["given"]), direct["zero_shot"], atol=1e-6)
            last = Metrics.of(found.accuracy(orders["given"])).mean("last")
            assert last == pytest.approx(direct["metrics"]["last"]["mean"], abs=1e-6)
        for order in orders.values():
            asked = Asked(routing=routing, order=tuple(names[t] for t in order), cache=False)
            afresh = report(evaluate_stored(config.run.storage, config.run.name, asked))
            np.testing.assert_allclose(found.accuracy(order), afresh["accuracy"], atol=1e-6)
            np.testing.assert_allclose(found.zero_shot(order), afresh["zero_shot"], atol=1e-6)
            assert figures_of(found, order)["weight_auroc"] == pytest.approx(afresh["weight_auroc"]["mean"], abs=1e-6)


@pytest.mark.long
def test_optuna_goes_on_from_the_settings_that_it_knows(config: Config, local_cluster: str) -> None:
    fields = {
        "name": "o",
        "search": "optuna",
        "parameters": {"calibration.bias": {"low": -2, "high": 4}, "evaluate.routing": ["image", "batch"]},
        "concurrent_trials": 2,
    }
    first = swept(config, said := [], num_samples=3, **fields)
    assert len(first["trials"]) == 3
    assert all(-2 <= t["setting"]["calibration.bias"] <= 4 for t in first["trials"])
    assert {t["validation"]["orders_by"] for t in first["trials"]} == {"indexing"}

    more = swept(config, said := [], num_samples=5, **fields)
    assert more["trials"][:3] == first["trials"]
    assert len(more["trials"]) == 5
    assert more["modules_trained"] == 0
    assert sum(line.startswith("[") for line in said) == 2

    again = swept(config, said := [], num_samples=5, **fields)
    assert again["trials"] == more["trials"]
    assert again["chosen"] == more["chosen"]


@pytest.mark.long
def test_methods_of_every_kind_side_by_side(
    config: Config, local_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Independent, sequential and joint ones in one sweep: each order's numbers are those of a run in that order, and
    costs are known. Paths in a setting are from where the sweep was started. A repeated sweep reads."""
    (mist,) = (task.index.uri for task in make_plan(config, load_backbone(config)).tasks if task.name == "mist")
    monkeypatch.chdir(config.data.root)
    config = config.model_copy(update={"tasks": config.tasks[:2]})
    cases = [
        {"method": {"name": "zero_shot"}},
        {"method": {"name": "sequential_lora", "rank": 1, "against_forgetting": "ewc"}, "train.lr": 0.01},
        {"method": {"name": "rail", "hidden_dim": 16}},
        {"method": {"name": "zscl", "rank": 1, "reference": Path(mist).name, "reference_batch": 4}, "train.lr": 0.01},
    ]
    fields = {"name": "methods", "cases": cases, "orders": {"num_random": 1}}
    document = swept(config, [], **fields)
    by_name = {t["setting"]["method"]["name"]: t["validation"] for t in document["trials"]}
    assert {n: v["orders_by"] for n, v in by_name.items()} == {
        "zero_shot": "indexing",
        "sequential_lora": "training",
        "rail": "indexing",
        "zscl": "training",
    }
    assert document["modules_trained"] == 2 + 2 * 2 + 2 + 2 * 2  # sequential: both orders
    costs = {n: v["cost"] for n, v in by_name.items()}
    assert costs["zero_shot"]["num_parameters"] == costs["rail"]["num_parameters"] == 0
    assert costs["sequential_lora"]["num_parameters"] > 0
    for cost in costs.values():
        assert min(cost[c] for c in ("num_bytes", "train_s", "train_cpu_s", "evaluate_s", "images_per_s")) > 0
        assert 100 < cost["peak_mb"] < 100_000

    for setting in cases[1:]:
        values = {v["order"]: v for v in by_name[setting["method"]["name"]]["values"]}
        for name, order in document["orders"].items():
            one = varied(config, setting).model_copy(update={"tasks": tuple(config.tasks[t] for t in order)})
            plan = make_plan(one, load_backbone(one))
            digests = modules_of(plan)  # all in the library
            given = range(len(order))
            alone = figures_of(evaluated(plan, digests, [given], "val"), given)
            assert values[name]["last"] == pytest.approx(alone["last"], abs=1e-6)
            assert values[name]["average"] == pytest.approx(alone["average"], abs=1e-6)

    elsewhere = {"evaluate.num_workers": 2, "train.max_failures": 7, "train.collective_timeout_s": 60}
    again = swept(varied(config, elsewhere), said := [], **fields)
    assert said[0] == "known already: 4 of 4 settings"
    assert again["trials"] == document["trials"]
    assert again["modules_trained"] == 0
