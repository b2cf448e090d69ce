"""The configuration of a sweep: which fields vary and how, over which orders and seeds, and what is best.

Pure: settings, orders and the choice among results are values, tested without Ray.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from diki_ray.config.load import load, parse, read_file, refuse_resolvers, sentences
from diki_ray.config.run import NAME, Config, Section
from diki_ray.errors import ConfigError


class Range(Section):
    """Values between two numbers, for search=random and search=optuna."""

    low: float
    high: float
    log: bool = False
    """True: drawn evenly in the logarithm."""
    integer: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 with log=true")
        return self

    def draw(self, rng: random.Random) -> float | int:
        """A value between low and high, both possible with integer=true."""
        if self.log:
            low, high = math.log(self.low), math.log(self.high + (1 if self.integer else 0))
            value = math.exp(rng.uniform(low, high))
            return min(max(int(value), int(self.low)), int(self.high)) if self.integer else value
        return rng.randint(int(self.low), int(self.high)) if self.integer else rng.uniform(self.low, self.high)


class OrdersSection(Section):
    """Over which orders of the tasks every setting is judged; the configuration's own is always the first."""

    named: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Orders by task names."""
    num_random: int = Field(default=0, ge=0)
    """Further orders, drawn with `seed`, no two the same."""
    all: bool = False
    """Every permutation; for at most 6 tasks."""
    seed: int = Field(default=0, ge=0)


class ObjectiveSection(Section):
    """What is maximised on the validation split: the weighted mean of the metrics, over orders and seeds."""

    transfer: float = Field(default=1.0, ge=0)
    average: float = Field(default=1.0, ge=0)
    last: float = Field(default=1.0, ge=0)

    def of(self, metrics: Mapping[str, float | None]) -> float:
        """None is a metric that is not defined: a stream of one task has no Transfer."""
        known = [(w, value) for n, w in self.model_dump().items() if w and (value := metrics[n]) is not None]
        if not known:
            raise ConfigError("objective: a stream of one task has no Transfer; give another metric a weight.")
        return sum(w * value for w, value in known) / sum(w for w, _ in known)

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("every weight is 0: there would be nothing to maximise")
        return self


class SweepConfig(Section):
    """One sweep. The same name on the same storage is continued: settings that have a result are not run again."""

    name: str = Field(pattern=NAME)
    base: str
    """The configuration that is varied; a path relative to this file."""
    parameters: dict[str, list[Any] | Range] = Field(default_factory=dict)
    """Dotted field of the configuration -> its values, or a range."""
    cases: list[dict[str, Any]] = Field(default_factory=list)
    """Fields that vary together, as a method with the learning rate that suits it; each case with every combination of
    `parameters`. With search=grid."""
    seeds: tuple[int, ...] = (0,)
    orders: OrdersSection = OrdersSection()
    search: Literal["grid", "random", "optuna"] = "grid"
    num_samples: int = Field(default=16, ge=1)
    """Settings tried by random and optuna."""
    search_seed: int = Field(default=0, ge=0)
    """The draws of random and optuna start from this seed."""
    objective: ObjectiveSection = ObjectiveSection()
    scheduler: Literal["none", "asha"] = "none"
    """asha: a setting stops early when, after as many epochs, its modules' validation accuracy is not in the best
    third of those seen so far."""
    concurrent_trials: int = Field(default=1, ge=1)
    cpus_per_trial: float = Field(default=0.0, ge=0)
    """CPUs that Ray sets aside for a trial; none by default, so that trials cannot starve the worker groups which they
    start (train.num_workers above 1): concurrent_trials is then the only limit."""
    gpus_per_trial: float = Field(default=0.0, ge=0)
    """For trials that train or evaluate on a GPU themselves."""
    max_failures: int = Field(default=2, ge=0)
    """Times a trial that fails is tried again before it is shown with its error."""

    @model_validator(mode="after")
    def _ranges_need_sampling(self) -> Self:
        ranges = [name for name, values in self.parameters.items() if isinstance(values, Range)]
        if ranges and self.search == "grid":
            raise ValueError(f"{ranges[0]} is a range: list its values, or use search=random or search=optuna")
        empty = [name for name, values in self.parameters.items() if isinstance(values, list) and not values]
        if empty:
            raise ValueError(f"{empty[0]} has no values")
        if self.search != "grid" and self.cases:
            raise ValueError(f"cases go with search=grid, not with {self.search}")
        if self.search != "grid" and not self.parameters:
            raise ValueError(f"search={self.search} without parameters: there would be nothing to search")
        if self.scheduler == "asha":
            for name in ("train.epochs", "train.min_steps"):
                if name in self.parameters:
                    raise ValueError(f"{name} cannot vary with scheduler=asha, which compares settings epoch by epoch")
        return self

    def settings(self) -> list[dict[str, Any]]:
        """Returns those of grid and random: decided beforehand, equal every time, no two the same; none for optuna."""
        names, found = list(self.parameters), []
        if self.search == "grid":
            lists = [values for values in self.parameters.values() if isinstance(values, list)]
            combinations = [dict(zip(names, values, strict=True)) for values in itertools.product(*lists)]
            found = [case | values for case in self.cases or [{}] for values in combinations]
        elif self.search == "random":
            rng = random.Random(self.search_seed)
            for _ in range(self.num_samples):
                found.append(
                    {n: v.draw(rng) if isinstance(v, Range) else rng.choice(v) for n, v in self.parameters.items()}
                )
        return [setting for n, setting in enumerate(found) if setting not in found[:n]]

    def covers(self, setting: Mapping[str, Any]) -> bool:
        """Whether the sweep, as it is now, could try a setting."""
        if self.cases:
            return setting in self.settings()
        return setting.keys() == self.parameters.keys() and all(
            values.low <= setting[n] <= values.high if isinstance(values, Range) else setting[n] in values
            for n, values in self.parameters.items()
        )


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> tuple[SweepConfig, Config]:
    """The sweep and the configuration that it varies; overrides apply to the configuration.

    Raises:
        ConfigError: a file that is missing or not valid, a parameter that is no field of the configuration.
    """
    path = Path(path)
    tree = read_file(path, "the path of a sweep's YAML file")
    refuse_resolvers(tree, str(path))
    try:
        sweep = SweepConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {sentences(error, SweepConfig)}") from None
    config = load(path.parent / sweep.base, overrides)
    _check_values(sweep, config)
    return sweep, config


def _check_values(sweep: SweepConfig, config: Config) -> None:
    """Refuses an unknown field, and a value that is not valid in any of the settings, before anything runs."""
    refused: dict[tuple[str, str], ConfigError] = {}
    valid: set[tuple[str, str]] = set()
    for setting in sweep.model_copy(update={"search": "random"} if sweep.search == "optuna" else {}).settings():
        values = {(n, "" if isinstance(sweep.parameters.get(n), Range) else repr(v)) for n, v in setting.items()}
        try:
            varied(config, setting)
            valid |= values
        except ConfigError as error:
            refused |= dict.fromkeys(values, error)
    for value, refusal in refused.items():
        if value not in valid:
            raise refusal


def varied(config: Config, setting: Mapping[str, Any]) -> Config:
    """The configuration with a setting's fields (dotted names) replaced."""
    tree = config.model_dump()
    for name, value in setting.items():
        *sections, field = name.split(".")
        node = tree
        for section in sections:
            if not isinstance(node.get(section), dict):
                raise ConfigError(f"parameters: the configuration has no section {section!r} for {name!r}.")
            node = node[section]
        node[field] = value
    return parse(tree, source=f"parameters {dict(setting)}")


def orders_of(section: OrdersSection, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Name -> order of task numbers, the stream's own first."""
    num_tasks = len(names)
    orders: dict[str, tuple[int, ...]] = {"given": tuple(range(num_tasks))}
    for name, by_name in section.named.items():
        if sorted(by_name) != sorted(names):
            raise ConfigError(f"orders.named.{name}: it must hold every task once: {', '.join(names)}.")
        orders[name] = tuple(names.index(t) for t in by_name)
    if section.all:
        if num_tasks > 6:
            raise ConfigError(f"orders.all: {num_tasks} tasks have too many permutations; use num_random.")
        return orders | {_short(p): p for p in itertools.permutations(range(num_tasks)) if p not in orders.values()}
    rng = random.Random(section.seed)
    possible = 1
    for n in range(2, num_tasks + 1):
        possible *= n
    wanted = min(len(orders) + section.num_random, possible)
    while len(orders) < wanted:
        order = tuple(rng.sample(range(num_tasks), num_tasks))
        if order not in orders.values():
            orders[_short(order)] = order
    return orders


def _short(order: Sequence[int]) -> str:
    return "-".join(str(t) for t in order)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The numbers of the points that no other beats in one coordinate without losing in the other (both maximised)."""
    return [i for i, (x, y) in enumerate(points) if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)]


def setting_text(setting: Mapping[str, Any]) -> str:
    """A setting in one line, for people."""
    return ", ".join(f"{n}={value_text(v)}" for n, v in setting.items()) or "as configured"


def value_text(value: Any) -> str:
    """A field's value; a whole section's as its fields."""
    if isinstance(value, Mapping):
        return " ".join(f"{n}:{value_text(v)}" for n, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plain(value: Any) -> Any:
    """A number or a word as it is; what has parts as text."""
    return value if value is None or isinstance(value, bool | int | float | str) else value_text(value)
