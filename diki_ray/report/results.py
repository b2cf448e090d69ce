"""results.json, the document that a finished run leaves: its name, its format, and its accuracy matrix as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

FORMAT = 1
DOCUMENT = "results.json"


def table(results: dict[str, Any]) -> Table:
    """The accuracy matrix in percent: chance and zero-shot above it, the metrics per task below."""
    names = [t["name"] for t in results["tasks"]]
    title = f"{results['run']}: accuracy on each test set, %  ({results['protocol']})"
    out = Table(title=Text(title), title_justify="left")
    out.add_column("after learning")
    for name in (*names, "mean"):
        out.add_column(Text(name), justify="right")

    def row(
        label: str, values: Sequence[float | None], mean: float | None = None, style: str = "", end: bool = False
    ) -> None:
        defined = [v for v in values if v is not None]
        mean = sum(defined) / len(defined) if mean is None and defined else mean
        out.add_row(Text(label), *(_percent(v) for v in values), _percent(mean), style=style, end_section=end)

    row("(random chance)", [t["chance"] for t in results["tasks"]], style="dim")
    row("nothing: zero-shot", results["zero_shot"], end=True)
    for i, (name, values) in enumerate(zip(names, results["accuracy"], strict=True)):
        row(name, values, end=i + 1 == len(names))
    for name in ("transfer", "average", "last", "forgetting", "backward_transfer"):
        metric = results["metrics"][name]
        row(
            name.replace("_", " ").capitalize(),
            metric["per_task"],
            metric["mean"],
            style="bold" if name == "last" else "",
        )
    return out


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
