"""results.json, the document that a finished run leaves: its name, its format, and its accuracy matrix as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from diki_ray.answering.metrics import METRIC_NAMES
from diki_ray.config.protocols import held_out_of

FORMAT = 1
DOCUMENT = "results.json"

MAX_COLUMNS = 32
"""The terminal shows no matrix of more tasks than this: nobody reads a line of a thousand columns."""
WORST = 16


def table(results: dict[str, Any]) -> Table:
    """The accuracy matrix in percent: chance and zero-shot above it, the metrics per task below. Of a long stream the
    means, and the tasks that it answers worst."""
    title = f"{results['run']}: accuracy on each test set, %  ({results['protocol']})"
    out = Table(title=Text(title), title_justify="left", caption_justify="left")
    (_matrix if len(results["tasks"]) <= MAX_COLUMNS else _worst)(out, results)
    if (never_seen := held_out(results)) is not None:
        name, accuracy, zero_shot = never_seen
        out.caption = Text(
            f"{name}, of a kind never seen, once all the others are learnt: {_percent(accuracy)} "
            f"(zero-shot {_percent(zero_shot)})"
        )
    return out


def _worst(out: Table, results: dict[str, Any]) -> None:
    names, metrics = [t["name"] for t in results["tasks"]], results["metrics"]
    for column in (f"{len(names):,} tasks", "(random chance)", "zero-shot", "when learnt", "last", "forgetting"):
        out.add_column(column, justify="right" if len(out.columns) else "left")
    own = [results["accuracy"][j][j] for j in range(len(names))]
    columns = [[t["chance"] for t in results["tasks"]], results["zero_shot"], own]
    columns += [metrics["last"]["per_task"], metrics["forgetting"]["per_task"]]
    out.add_row("mean", *(_percent(_mean(column)) for column in columns), style="bold", end_section=True)
    known = [j for j in range(len(names)) if columns[3][j] is not None]
    for j in sorted(known, key=lambda j: columns[3][j])[:WORST]:
        out.add_row(Text(names[j]), *(_percent(column[j]) for column in columns))
    out.caption = (
        f"the {WORST} tasks of the lowest accuracy; transfer {_percent(metrics['transfer']['mean'])}, average "
    )
    out.caption += f"{_percent(metrics['average']['mean'])}; the report has every task"


def _matrix(out: Table, results: dict[str, Any]) -> None:
    names = [t["name"] for t in results["tasks"]]
    out.add_column("after learning")
    for name in (*names, "mean"):
        out.add_column(Text(name), justify="right")

    def row(
        label: str, values: Sequence[float | None], mean: float | None = None, style: str = "", end: bool = False
    ) -> None:
        mean = _mean(values) if mean is None else mean
        out.add_row(Text(label), *(_percent(v) for v in values), _percent(mean), style=style, end_section=end)

    row("(random chance)", [t["chance"] for t in results["tasks"]], style="dim")
    row("nothing: zero-shot", results["zero_shot"], end=True)
    for i, (name, values) in enumerate(zip(names, results["accuracy"], strict=True)):
        row(name, values, end=i + 1 == len(names))
    for name in METRIC_NAMES:
        metric = results["metrics"][name]
        row(
            name.replace("_", " ").capitalize(),
            metric["per_task"],
            metric["mean"],
            style="bold" if name == "last" else "",
        )


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [v for v in values if v is not None]
    return sum(defined) / len(defined) if defined else None


def held_out(results: Mapping[str, Any]) -> tuple[str, float | None, float | None] | None:
    """(name, accuracy once all the others are learnt, zero-shot accuracy) of the data set that the protocol keeps away
    until the end; None where it keeps none away."""
    names = [task["name"] for task in results["tasks"]]
    if len(names) < 2 or names[-1] != held_out_of(results["protocol"]):
        return None
    return names[-1], results["accuracy"][-2][-1], results["zero_shot"][-1]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
