"""Settings, orders and choices of a sweep are values."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from diki_ray.config import parse
from diki_ray.config.sweep import (
    ObjectiveSection,
    OrdersSection,
    SweepConfig,
    load_sweep,
    orders_of,
    pareto_front,
    varied,
)
from diki_ray.errors import ConfigError
from diki_ray.learning.methods import METHODS

ROOT = Path(__file__).parents[2]
BASE = {"run": {"name": "r"}, "tasks": [{"data": "embedded:digits"}]}
NAMES = ["a", "b", "c", "d"]


def write(folder: Path, **sweep: object) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "base": "base.yaml"} | sweep))
    return path


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        ({"parameter": {}}, "parameter: there is no such field; there are base, cases, concurrent_trials"),
        ({"parameters": {"train.epochz": [1]}}, r"train\.epochz: there is no such field"),
        ({"parameters": {"trian.epochs": [1]}}, "no section 'trian'"),
        ({"parameters": {"train.lr": []}}, "train.lr has no values"),
        ({"parameters": {"train.lr": {"low": 0.1, "high": 1}}}, "is a range: list its values, or use search"),
        ({"parameters": {"train.lr": {"low": 2, "high": 1}}, "search": "random"}, "low must be below high"),
        ({"objective": {"transfer": 0, "average": 0, "last": 0}}, "nothing to maximise"),
        ({"base": "none.yaml"}, "none.yaml: No such file"),
        ({"search": "optuna"}, "search=optuna without parameters"),
        ({"parameters": {"calibration.form": ["published", "validatd"]}}, "calibration.form.*'validatd'"),
        ({"parameters": {"train.epochs": [1, 2]}, "scheduler": "asha"}, "train.epochs cannot vary with scheduler=asha"),
        ({"parameters": {"train.min_steps": [1, 2]}, "scheduler": "asha"}, "train.min_steps cannot vary with"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, sweep: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_sweep(write(tmp_path, **sweep))


def test_a_setting_replaces_fields() -> None:
    whole = varied(parse(BASE), {"calibration": {"form": "validated", "slope": 2}})
    assert (whole.calibration.form, whole.calibration.slope, whole.calibration.bias) == ("validated", 2, None)
    config = varied(parse(BASE), {"train.epochs": 3, "calibration.form": "validated"})
    assert (config.train.epochs, config.calibration.form) == (3, "validated")


def test_orders_are_named_random_or_all_and_never_twice() -> None:
    own = (0, 1, 2, 3)
    assert orders_of(OrdersSection(), NAMES) == {"given": own}
    named = orders_of(OrdersSection(named={"back": ("d", "c", "b", "a")}), NAMES)
    assert named == {"given": own, "back": (3, 2, 1, 0)}
    drawn = orders_of(OrdersSection(num_random=19, seed=1), NAMES)
    assert len(set(drawn.values())) == 20
    assert drawn == orders_of(OrdersSection(num_random=19, seed=1), NAMES)
    assert drawn != orders_of(OrdersSection(num_random=19, seed=2), NAMES)
    assert len(set(orders_of(OrdersSection(all=True), NAMES).values())) == 24
    assert len(orders_of(OrdersSection(num_random=100), NAMES)) == 24  # there are no more
    with pytest.raises(ConfigError, match="every task once"):
        orders_of(OrdersSection(named={"x": ("a", "a", "b", "c")}), NAMES)
    with pytest.raises(ConfigError, match="too many permutations"):
        orders_of(OrdersSection(all=True), list("abcdefg"))


def test_objective_is_the_weighted_mean() -> None:
    metrics = {"transfer": 0.5, "average": 0.7, "last": 0.9}
    assert ObjectiveSection().of(metrics) == pytest.approx(0.7)
    assert ObjectiveSection(transfer=0, average=0, last=2).of(metrics) == pytest.approx(0.9)
    assert ObjectiveSection().of(metrics | {"transfer": None}) == pytest.approx(0.8)
    with pytest.raises(ConfigError, match="no Transfer; give another metric"):
        ObjectiveSection(average=0, last=0).of(metrics | {"transfer": None})


def test_pareto_front() -> None:
    assert pareto_front([(0.1, 0.9), (0.5, 0.5), (0.4, 0.4), (0.9, 0.1), (0.5, 0.5)]) == [0, 1, 3, 4]


def test_a_value_that_is_valid_in_some_setting_is_not_refused(tmp_path: Path) -> None:
    """A weight decay is for adamw alone: that pair runs, the other is a failed setting."""
    parameters = {"train.optimizer": ["sgd", "adamw"], "train.weight_decay": [0.0, 0.1]}
    sweep, _ = load_sweep(write(tmp_path, parameters=parameters))
    assert len(sweep.settings()) == 4


def sweep(**fields: object) -> SweepConfig:
    return SweepConfig.model_validate({"name": "s", "base": "x"} | fields)


def test_a_grid_is_the_product_and_a_random_search_the_same_every_time() -> None:
    grid = sweep(parameters={"a.b": [1, 2], "c.d": ["x", "y", "x"]}).settings()
    assert grid[0] == {"a.b": 1, "c.d": "x"}
    assert len(grid) == 4  # no two the same
    assert sweep().settings() == [{}]  # the configuration as it is
    ranges = {
        "lr": {"low": 1e-4, "high": 1.0, "log": True},
        "depth": {"low": 1, "high": 3, "integer": True},
        "length": {"low": 1, "high": 16, "integer": True, "log": True},
        "form": ["published", "validated"],
    }
    drawn = sweep(search="random", num_samples=200, parameters=ranges)
    settings = drawn.settings()
    assert settings == sweep(search="random", num_samples=200, parameters=ranges).settings()
    assert settings != sweep(search="random", num_samples=200, parameters=ranges, search_seed=1).settings()
    assert {s["depth"] for s in settings} == {1, 2, 3}
    assert {s["form"] for s in settings} == {"published", "validated"}
    assert all(1 <= s["length"] <= 16 and isinstance(s["length"], int) for s in settings)
    assert 0.3 < sum(s["lr"] < 1e-2 for s in settings) / 200 < 0.7  # half of them, for it is drawn in the logarithm
    assert all(drawn.covers(s) for s in settings)
    assert not drawn.covers(settings[0] | {"depth": 4})
    assert not drawn.covers({"lr": 0.1})
    assert sweep(search="optuna", parameters=ranges).settings() == []


def test_each_case_is_tried_with_every_combination_of_the_parameters() -> None:
    cases = [{"method": {"name": "zero_shot"}}, {"method": {"name": "rail"}, "train.lr": 0.1}]
    sweep = SweepConfig.model_validate(
        {"name": "s", "base": "b", "cases": cases, "parameters": {"train.epochs": [1, 2]}}
    )
    assert sweep.settings() == [case | {"train.epochs": n} for case in cases for n in (1, 2)]
    assert sweep.covers(cases[1] | {"train.epochs": 2})
    assert not sweep.covers(cases[1])
    with pytest.raises(ValidationError, match="cases go with search=grid"):
        SweepConfig.model_validate({"name": "s", "base": "b", "cases": cases, "search": "random"})


def test_the_comparisons_of_methods_are_valid() -> None:
    sweep, _ = load_sweep(ROOT / "configs/compare_embedded.yaml")
    assert {case["method"]["name"] for case in sweep.cases} == set(METHODS)
    for name in ("compare_real7", "compare_gem_styles"):
        load_sweep(ROOT / f"configs/{name}.yaml")
