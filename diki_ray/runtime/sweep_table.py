"""The tables of a sweep's document: settings on validation, and the chosen one on test."""

from __future__ import annotations

from typing import Any

from rich.table import Table

COLUMNS = ("objective", "transfer", "average", "last", "forgetting")


def sweep_tables(document: dict[str, Any]) -> list[Table]:
    """Settings best first with mean ± standard deviation over orders and seeds, failed ones with their error, and the
    chosen setting's test numbers beside zero-shot."""
    name, orders, seeds = document["sweep"]["name"], document["orders"], document["sweep"]["seeds"]
    settings = Table(
        title=f"{name}: validation, % over {len(orders)} orders and {len(seeds)} seeds", title_justify="left"
    )
    settings.add_column("setting")
    for column in COLUMNS:
        settings.add_column(column, justify="right")
    settings.add_column("Pareto")
    ended = [t for t in document["trials"] if t["validation"]]
    for t in sorted(ended, key=lambda t: -t["validation"]["objective"]["mean"]):
        mark = "*" if t["setting"] in document["pareto"] else ""
        settings.add_row(_named(t["setting"]), *(_percent(t["validation"][c]) for c in COLUMNS), mark)
    for t in document["trials"]:
        if not t["validation"]:
            settings.add_row(_named(t["setting"]), t["error"] or "stopped early", *[""] * len(COLUMNS))
    chosen = document["chosen"]
    test = Table(title=f"chosen on validation: {_named(chosen['setting'])}; on test, %", title_justify="left")
    for column in ("zero_shot", "transfer", "average", "last", "forgetting"):
        test.add_column(column.replace("_", "-"), justify="right")
    test.add_row(*(_percent(chosen["test"][c]) for c in ("zero_shot", "transfer", "average", "last", "forgetting")))
    test.caption = f"{document['modules_trained']} modules trained, {document['seconds']:.0f} s"
    return [settings, test]


def _named(setting: dict[str, Any]) -> str:
    return (
        ", ".join(f"{n}={v:.4g}" if isinstance(v, float) else f"{n}={v}" for n, v in setting.items()) or "as configured"
    )


def _percent(spread: dict[str, float | None]) -> str:
    if spread["mean"] is None:
        return "–"
    return f"{100 * spread['mean']:.1f}" + ("" if spread["std"] is None else f" ± {100 * spread['std']:.1f}")
