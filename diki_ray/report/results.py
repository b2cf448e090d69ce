"""results.json, the document that a finished run leaves: its name, its format, and its accuracy matrix as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from diki_ray.config.protocols import embedded_protocols

FORMAT = 1
DOCUMENT = "results.json"


def table(results: dict[str, Any]) -> Table:
    """The accuracy matrix in percent: chance and zero-shot above it, the metrics per task below."""
    names = [t["name"] for t in results["tasks"]]
    title = f"{results['run']}: accuracy on each test set, %  ({results['protocol']})"
    out = Table(title=Text(title), title_justify="left", caption_justify="left")
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
    if (never_seen := held_out(results)) is not None:
        name, accuracy, zero_shot = never_seen
        out.caption = Text(
            f"{name}, of a kind never seen, once all the others are learnt: {_percent(accuracy)} "
            f"(zero-shot {_percent(zero_shot)})"
        )
    return out


def held_out(results: Mapping[str, Any]) -> tuple[str, float | None, float | None] | None:
    """(name, accuracy once all the others are learnt, zero-shot accuracy) of the data set that the protocol keeps away
    until the end; None where it keeps none away."""
    known = embedded_protocols().get(results["protocol"].partition("/")[0])
    names = [task["name"] for task in results["tasks"]]
    if known is None or known.held_out is None or len(names) < 2 or names[-1] != known.held_out:
        return None
    return names[-1], results["accuracy"][-2][-1], results["zero_shot"][-1]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
