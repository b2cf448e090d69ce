"""What a sweep leaves for others to read: tables as CSV and Parquet, the report, the chosen configuration."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from diki_ray.config import Config
from diki_ray.config.sweep import plain
from diki_ray.report.sweep import render
from diki_ray.runs.sweep.results import SweepResults
from diki_ray.runs.sweep.trial import METRICS, NEVER_SEEN

DOCUMENT, REPORT, CHOSEN = "sweep.json", "report.html", "chosen.yaml"


def write_files(document: dict[str, Any], chosen: Config, results: SweepResults) -> None:
    """Writes all of them; the document last, so that who finds it finds the others."""
    for name, rows in (("settings", setting_rows(document)), ("values", value_rows(document))):
        table = as_table(rows)
        for write, ending in ((csv.write_csv, "csv"), (parquet.write_table, "parquet")):
            buffer = io.BytesIO()
            write(table, buffer)
            results.put(f"{name}.{ending}", buffer.getvalue())
    results.put(CHOSEN, runnable(document, chosen).encode())
    results.put(REPORT, render(document).encode())
    results.put(DOCUMENT, json.dumps(document, indent=1, sort_keys=True).encode())


def setting_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each setting: its fields, mean and standard deviation of every metric on validation, how it ended."""
    rows = []
    for trial in document["trials"]:
        row = {n: plain(v) for n, v in trial["setting"].items()}
        for metric in ("objective", *METRICS, *([NEVER_SEEN] if NEVER_SEEN in document["chosen"]["test"] else [])):
            spread = (trial["validation"] or {}).get(metric, {"mean": None, "std": None})
            row |= {metric: spread["mean"], f"{metric}_std": spread["std"]}
        row |= (trial["validation"] or {}).get("cost", {})
        row |= {
            "orders_by": trial["validation"] and trial["validation"]["orders_by"],
            "pareto": bool(trial["validation"]) and trial["setting"] in document["pareto"],
            "chosen": trial["setting"] == document["chosen"]["setting"],
            "stopped_at_epoch": trial["stopped_at_epoch"],
            "error": trial["error"],
        }
        rows.append(row)
    return rows


def value_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each setting, order and seed on validation, and for the chosen setting on test."""
    judged = [(t["setting"], "val", t["validation"]) for t in document["trials"] if t["validation"]]
    judged.append((document["chosen"]["setting"], "test", document["chosen"]["test"]))
    tasks = {name: " ".join(document["tasks"][t] for t in order) for name, order in document["orders"].items()}
    return [
        {n: plain(v) for n, v in setting.items()} | {"split": split, **value, "tasks": tasks[value["order"]]}
        for setting, split, result in judged
        for value in result["values"]
    ]


def as_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """A column whose values have no common type (a number or a word) becomes text; so do whole sections."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        values = [json.dumps(v, sort_keys=True) if isinstance(v, dict) else v for v in values]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            columns[name] = pa.array([None if v is None else str(v) for v in values])
    return pa.table(columns)


def runnable(document: dict[str, Any], chosen: Config) -> str:
    """The chosen configuration as YAML for `diki-ray continual`, which finds all its modules trained."""
    tree = chosen.model_dump()
    tree["run"] |= {"name": f"{document['sweep']['name'][:57]}-chosen", "seed": document["sweep"]["seeds"][0]}
    command = "diki-ray continual --config chosen.yaml"
    return f"# Chosen by the sweep {document['sweep']['name']}. {command}\n{Config.model_validate(tree).to_yaml()}"
