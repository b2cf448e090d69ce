"""An evaluation and its comparisons as tables for a terminal; the numbers are those of the JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

MAX_SQUARE_TASKS = 24
"""Up to here the confusion has a column for each task; beyond, no terminal is wide enough."""


def tables(document: Mapping[str, Any], with_classes: bool = False) -> Iterator[Table | Text]:
    """What `answering.figures.report` says: the matrix' last row, routes, calibration; each class if asked for."""
    yield _summary(document)
    for note in document["notes"]:
        yield Text(f"note: {note}")
    yield _confusion(document["confusion"])
    yield _calibration(document["calibration"])
    if with_classes:
        yield from (_classes(t) for t in document["test_sets"])
    yield from _weights(document)


def _summary(document: Mapping[str, Any]) -> Table:
    name = document["protocol"] or f"{document['routing']} routing, label space {document['label_space']}"
    title = f"{document['run']}: after {len(document['order'])} tasks, {document['split']} split, %  ({name})"
    out = _table(title, ("test set", "images", "zero-shot", "accuracy", "class mean", "ECE", "weight", "own task"))
    for t, row in zip(document["test_sets"], document["confusion"]["counts"], strict=True):
        own = row[document["order"].index(t["name"])] / t["num_images"] if t["learnt"] else None
        name = t["name"] if t["learnt"] else f"{t['name']} (not learnt)"
        values = (t["zero_shot"], t["accuracy"], t["mean_class_accuracy"], t["ece"], t["mean_weight"], own)
        out.add_row(_cell(name), f"{t['num_images']:,}", *map(_percent, values))
    out.add_section()
    for name, metric in document["metrics"].items():
        out.add_row(_cell(name.replace("_", " ").capitalize()), "", "", _percent(metric["mean"]))
    return out


def _confusion(confusion: Mapping[str, Any]) -> Table | Text:
    if len(confusion["columns"]) > MAX_SQUARE_TASKS:
        return Text(f"routed to their own task, mean over learnt test sets: {_percent(confusion['own'])} %")
    out = _table("Routed to, images", ("test set", *confusion["columns"]))
    for name, counts in zip(confusion["rows"], confusion["counts"], strict=True):
        out.add_row(_cell(name), *(f"{c:,}" for c in counts))
    out.caption = f"to their own task: {_percent(confusion['own'])} % (mean over learnt test sets)"
    return out


def _calibration(calibration: Mapping[str, Any]) -> Table:
    out = _table(
        "Confidence against accuracy on the learnt test sets, %",
        ("confidence", "images", "mean", "accuracy", "zero-shot: images", "mean", "accuracy"),
    )
    learnt, frozen = calibration["learnt"], calibration["zero_shot"]
    for n, (a, b) in enumerate(zip(learnt["bins"], frozen["bins"], strict=True), start=1):
        if a["num_images"] or b["num_images"]:
            cells = [f(x) for x in (a, b) for f in (_count, _confidence, _accuracy)]
            out.add_row(f"to {100 * n / len(learnt['bins']):.0f}", *cells)
    out.caption = f"ECE {_percent(learnt['ece'])} %, zero-shot {_percent(frozen['ece'])} %"
    return out


def _count(line: Mapping[str, Any]) -> str:
    return f"{line['num_images']:,}"


def _confidence(line: Mapping[str, Any]) -> str:
    return _percent(line["confidence"])


def _accuracy(line: Mapping[str, Any]) -> str:
    return _percent(line["accuracy"])


def _classes(test_set: Mapping[str, Any]) -> Table:
    out = _table(f"{test_set['name']}, each class, %", ("class", "images", "zero-shot", "accuracy"))
    for c in test_set["classes"]:
        out.add_row(_cell(c["name"]), f"{c['num_images']:,}", _percent(c["zero_shot"]), _percent(c["accuracy"]))
    return out


def _weights(document: Mapping[str, Any]) -> Iterator[Text]:
    auroc = document["weight_auroc"]
    if auroc["mean"] is None:
        yield Text("Integration weight: no test set is left unlearnt, there is nothing to tell apart.")
        return
    after = ", ".join(
        f"{name} {'–' if value is None else f'{value:.3f}'}"
        for name, value in zip(document["order"], auroc["after"], strict=True)
    )
    yield Text(f"Integration weight, AUROC of learnt against unlearnt domains: {auroc['mean']:.3f} (after {after})")


def comparison(document: Mapping[str, Any]) -> Iterator[Table | Text]:
    """What `answering.comparison.compare` says."""
    level = f"{100 * document['level']:g} % interval"
    title = f"{document['other']} less {document['run']}, %"
    out = _table(title, ("", document["run"], document["other"], "difference", level))
    for name, line in document["metrics"].items():
        _add(out, name.replace("_", " ").capitalize(), line)
    out.add_section()
    for t in document["test_sets"]:
        _add(out, f"Last on {t['name']}", t["last"])
    out.caption = "* zero lies outside the interval, which says what other test images would do, not another seed"
    yield out
    for note in document["notes"]:
        yield Text(f"note: {note}")


def _add(out: Table, name: str, line: Mapping[str, Any] | None) -> None:
    if line is None:
        out.add_row(_cell(name), "–", "–", "–", "–")
        return
    star = " *" if line["significant"] else ""
    span = f"{100 * line['low']:+.1f} … {100 * line['high']:+.1f}"
    out.add_row(
        _cell(name), _percent(line["run"]), _percent(line["other"]), f"{100 * line['difference']:+.1f}{star}", span
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    out = Table(title=_cell(title), title_justify="left", caption_justify="left")
    for n, name in enumerate(columns):
        out.add_column(_cell(name), justify="right" if n else "left")
    return out


def _cell(value: str) -> Text:
    return Text(value)  # as it is: a class may be called [b]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
