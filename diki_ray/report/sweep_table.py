"""The tables of a sweep's document: settings on validation, and the chosen one on test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from diki_ray.config.sweep import setting_text

COSTS = {
    "num_parameters": "trained parameters a task",
    "num_bytes": "stored bytes of a stream",
    "train_s": "training of a stream, s",
    "train_cpu_s": "the same, processor s",
    "peak_mb": "peak memory in training, MB",
    "evaluate_s": "evaluation of an order, s",
    "images_per_s": "images answered a second",
}
COLUMNS = ("objective", "transfer", "average", "last", "forgetting", "weight_auroc")


def columns_of(document: Mapping[str, Any]) -> tuple[str, ...]:
    """The metrics of a setting; with the accuracy on a domain never seen where the protocol keeps one away."""
    judged = [t["validation"] for t in document["trials"] if t["validation"]]
    return (*COLUMNS, "never_seen") if all("never_seen" in v for v in judged) else COLUMNS


def sweep_tables(document: Mapping[str, Any]) -> list[Table]:
    """Settings best first with mean ± standard deviation over orders and seeds, their costs, those without a
    result and why, and the chosen setting's test numbers beside zero-shot."""
    name, orders, seeds = document["sweep"]["name"], document["orders"], document["sweep"]["seeds"]
    settings = Table(
        title=f"{name}: validation, % over {len(orders)} orders and {len(seeds)} seeds", title_justify="left"
    )
    settings.add_column("setting", overflow="fold")
    columns = columns_of(document)
    for column in columns:
        settings.add_column(column.replace("_", " "), justify="right")
    settings.add_column("Pareto")
    cost = Table(title="what they cost", title_justify="left")
    cost.add_column("setting", overflow="fold")
    for column in COSTS.values():
        cost.add_column(column, justify="right", max_width=12)  # wider headings leave a setting a few letters
    for t in best_first(document):
        mark, text = "*" if t["setting"] in document["pareto"] else "", escape(setting_text(t["setting"]))
        settings.add_row(text, *(percent(t["validation"][c]) for c in columns), mark)
        cost.add_row(text, *costs(t))
    settings.caption = baselines_text(document)
    test = Table(title=f"chosen on validation: {setting_text(document['chosen']['setting'])}", title_justify="left")
    test.add_column("test, %")
    test_columns = ("zero_shot", *columns[1:])
    for column in test_columns:
        test.add_column(column.replace("_", " "), justify="right")
    test.add_row("chosen", *(percent(document["chosen"]["test"][c]) for c in test_columns))
    test.caption = how_it_was_made(document)
    return [settings, cost, *_without_result(document), test]


def baselines_text(document: Mapping[str, Any]) -> str:
    """Says what every setting is to be read against: the frozen model and guessing, over the same columns."""
    best = best_first(document)[0]["validation"]
    chance = f", chance {100 * best['chance']:.1f}" if "chance" in best else ""
    return f"beside them, mean over all test sets: zero-shot {percent(best['zero_shot'])}{chance}"


def best_first(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings that have a result."""
    ended = [t for t in document["trials"] if t["validation"]]
    return sorted(ended, key=lambda t: -t["validation"]["objective"]["mean"])


def outcome(trial: dict[str, Any]) -> str:
    """Why a setting has no result."""
    return trial["error"] or f"stopped early, after {trial['stopped_at_epoch']:g} epochs"


def how_it_was_made(document: Mapping[str, Any]) -> str:
    by = {t["validation"]["orders_by"] for t in document["trials"] if t["validation"]}
    said = {
        frozenset({"indexing"}): "every order by indexing into one table of answers",
        frozenset({"evaluation"}): "every order evaluated directly",
        frozenset({"training"}): "modules that build on each other: every order trained",
    }.get(frozenset(by), "orders by indexing where that is exact, evaluated or trained directly elsewhere")
    parts = {
        part: sum(t["validation"]["seconds"][part] for t in document["trials"] if t["validation"])
        for part in ("train", "tables", "orders")
    }
    spent = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in parts.items())
    return (
        f"{said}; {document['modules_trained']} modules trained, {document['seconds']:.0f} s (of the settings: {spent})"
    )


def percent(spread: dict[str, float | None]) -> str:
    """Mean ± standard deviation."""
    if spread["mean"] is None:
        return "–"
    return f"{100 * spread['mean']:.1f}" + ("" if spread["std"] is None else f" ± {100 * spread['std']:.1f}")


def _without_result(document: Mapping[str, Any]) -> list[Table]:
    trials = [t for t in document["trials"] if not t["validation"]]
    table = Table(title="without a result", title_justify="left")
    table.add_column("setting")
    table.add_column("why")
    for t in trials:
        table.add_row(escape(setting_text(t["setting"])), escape(outcome(t)))
    return [table] if trials else []


def costs(trial: Mapping[str, Any]) -> list[str]:
    """Returns a setting's costs as text, in the order of `COSTS`; results of earlier versions lack some of them."""
    known = trial["validation"].get("cost", {})
    return ["–" if (value := known.get(name)) is None else f"{value:,}" for name in COSTS]
