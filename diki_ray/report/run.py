"""report.html: everything a run says, on one page that needs no network, no scripts and no other file.

results.json in, HTML out. The template (report.html.j2) only arranges; every number it shows is decided here. Class
names, commands and configurations are other people's text: the template escapes all of it, and a content security
policy inside the page allows neither scripts nor anything from elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
import yaml

from diki_ray.answering.metrics import METRIC_NAMES
from diki_ray.config import Config
from diki_ray.config.protocols import ZERO_SHOT
from diki_ray.errors import UserError
from diki_ray.json_text import parsed
from diki_ray.report import charts
from diki_ray.report.examples import Pictures, read_pictures
from diki_ray.report.published import PUBLISHED_METRICS, compare
from diki_ray.report.results import DOCUMENT, FORMAT, held_out
from diki_ray.report.results_schema import check_results
from diki_ray.store.files import read_bytes
from diki_ray.store.run_store import RunStore

REPORT = "report.html"
MAX_SQUARE_TASKS = 64
"""Up to here the page has tables of a cell for every pair of tasks; a thousand tasks would make 300 MB of them."""
MAX_DETAILED_TASKS = 128
"""Charts and examples of so many tasks are shown, of a longer stream those of the lowest accuracy at the end."""
STAGES = ("plan", "cluster", "train", "evaluate")

Results = Mapping[str, Any]
"""The content of a results.json."""


def load_results(run: str, storage: str) -> Results:
    """The results of a run of a storage, or those in the file `run` when that ends in .json (any place data may lie).

    Raises:
        UserError: there are none, or of a format that this version does not know.
    """
    if run.endswith(".json"):
        try:
            results = parsed(read_bytes(run))
        except FileNotFoundError:
            raise UserError(f"there is no file {run}: give the name of a run, or the path of a results.json.") from None
        except ValueError as error:
            raise UserError(f"{run} is not a results.json: {error}") from error
    else:
        results = RunStore.open(storage, run).get_document(DOCUMENT)
        if results is None:
            known = ", ".join(RunStore.runs(storage)) or "none"
            raise UserError(
                f"{storage} has no results of a run {run!r}; its runs are: {known}. A run has results once it was "
                "evaluated; give --storage if it lies elsewhere."
            )
    found = results.get("format") if isinstance(results, dict) else None
    if found != FORMAT:
        raise UserError(f"the results of {run} have format {found}, this version reads {FORMAT}: run the job again.")
    return check_results(results, f"the results of {run}")


def render(runs: Sequence[Results], pictures: Callable[[Mapping[str, Any]], Pictures] = read_pictures) -> str:
    """The report of one run, or of several side by side.

    pictures: of the examples of a task of results.json; by default read from its test shards.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"percent": _percent, "points": _points, "seconds": _seconds}
    template = environment.from_string((files("diki_ray.report") / "run.html.j2").read_text("utf-8"))
    labels = _labels(runs)
    return template.render(
        runs=[_view(results, label, pictures) for results, label in zip(runs, labels, strict=True)],
        differences=_differing_settings(runs),
        warnings=_warnings(runs),
        all_tasks=list(dict.fromkeys(t["name"] for results in runs for t in results["tasks"])),
        summary=METRIC_NAMES,
        published_metrics=PUBLISHED_METRICS,
        zero_shot=ZERO_SHOT,
        box=charts,
    )


def _labels(runs: Sequence[Results]) -> list[str]:
    """Run names; where two are equal, with their storage."""
    count = Counter(results["run"] for results in runs)
    return [r["run"] if count[r["run"]] == 1 else f"{r['run']} ({r['config']['run']['storage']})" for r in runs]


def _view(results: Results, label: str, pictures: Callable[[Mapping[str, Any]], Pictures]) -> dict[str, Any]:
    tasks = results["tasks"]
    last = results["metrics"]["last"]["per_task"]
    worst = sorted(range(len(tasks)), key=lambda j: 0.0 if last[j] is None else last[j])[:MAX_DETAILED_TASKS]
    shown = [(tasks[j], last[j]) for j in sorted(worst)]
    return {
        "label": label,
        "results": results,
        "tasks": tasks,
        "names": [t["name"] for t in tasks],
        "matrix": _matrix(results),
        "held_out": held_out(results),
        "chance": _mean([t["chance"] for t in tasks]),
        "zero_shot": _mean(results["zero_shot"]),
        # Transfer leaves the first task out, so what it is to be read against does too.
        "zero_shot_of_transfer": _mean(results["zero_shot"][1:]),
        "last_by_task": dict(zip([t["name"] for t in tasks], results["metrics"]["last"]["per_task"], strict=True)),
        "curves": [_curves(t) for t, _ in shown],
        "routing": _routing(tasks),
        "weights": [_weights(t) for t, _ in shown],
        "examples": [{"task": t, "pictures": pictures(t), "last": value} for t, value in shown],
        "num_parameters": sum(t["module"]["num_parameters"] for t in tasks),
        "total_s": sum(results["seconds"].values()),
        "stages": list(_in_order(results["seconds"], STAGES).items()),
        "config_yaml": yaml.safe_dump(
            _in_order(results["config"], Config.model_fields), sort_keys=False, allow_unicode=True
        ),
        "comparison": compare(results),
    }


def _matrix(results: Results) -> list[dict[str, Any]]:
    """A row for each task learnt (of a long stream only the last): cells with the accuracy, its difference to
    zero-shot, and where it stands to what was learnt by then: `own` (just learnt), `before` (learnt earlier) or `after`
    (not learnt yet)."""
    rows, num = [], len(results["tasks"])
    for i in range(num) if num <= MAX_SQUARE_TASKS else [num - 1]:
        task, values = results["tasks"][i], results["accuracy"][i]
        cells = [
            {
                "value": value,
                "change": None if value is None or zero is None else value - zero,
                "place": "own" if i == j else "before" if j < i else "after",
            }
            for j, (value, zero) in enumerate(zip(values, results["zero_shot"], strict=True))
        ]
        rows.append({"label": task["name"], "cells": cells, "mean": _mean(values)})
    return rows


def _curves(task: Mapping[str, Any]) -> dict[str, Any]:
    history, best = task["history"], task["best_epoch"]
    accuracies = [("training", [h.get("accuracy") for h in history])]
    if any(h.get("validation_accuracy") is not None for h in history):
        accuracies.append(("validation", [h.get("validation_accuracy") for h in history]))
    return {
        "name": task["name"],
        "best_epoch": best,
        "num_epochs": len(history),
        "loss": charts.line_chart([("loss", [h.get("loss") for h in history])], mark=best),
        "accuracy": charts.line_chart(accuracies, top=1.0, percent=True, mark=best),
    }


def _routing(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each test set the share of its images that each task's module, and the frozen model, answered at the end; in
    a long stream the other tasks' together."""
    square = len(tasks) <= MAX_SQUARE_TASKS
    rows = []
    for j, task in enumerate(tasks):
        to, frozen = task["routed"]["tasks"], task["routed"]["frozen"]
        counts = [*to, frozen] if square else [to[j], sum(to) - to[j], frozen]
        total, own = sum(counts) or 1, j if square else 0
        cells = [{"count": c, "share": c / total, "own": k == own} for k, c in enumerate(counts)]
        rows.append({"label": task["name"], "num_test": task["num_test"], "cells": cells})
    return {
        "columns": [*([t["name"] for t in tasks] if square else ["its own task", "others"]), "frozen"],
        "rows": rows,
    }


def _weights(task: Mapping[str, Any]) -> dict[str, Any]:
    learnt, unlearnt = task["weights"]["learnt"], task["weights"]["unlearnt"]
    means = (learnt["mean"], unlearnt["mean"] if unlearnt else None)
    return {
        "name": task["name"],
        "learnt": means[0],
        "unlearnt": means[1],
        "chart": charts.histogram(learnt["counts"], unlearnt["counts"] if unlearnt else None, means),
    }


# --- several runs ---------------------------------------------------------------------------------------------------


def _warnings(runs: Sequence[Results]) -> list[str]:
    """Why numbers of these runs may not be compared, a sentence each."""
    found = []
    if len({r["protocol"] for r in runs}) > 1:
        found.append("These runs follow different protocols or routings: their numbers are not comparable.")
    if len({r["config"]["evaluate"]["label_space"] for r in runs}) > 1:
        found.append("They are answered among different label spaces.")
    if len({r["backbone"]["digest"] for r in runs}) > 1:
        found.append("They stand on different backbones: compare each with its own zero-shot row.")
    for results in runs:
        for task in results["tasks"]:
            if lacking := task["data"].get("shortcomings"):
                found.append(f"{results['run']}, {task['name']} is not complete: {'; '.join(lacking)}.")
    data: dict[str, set[str]] = {}
    for results in runs:
        for task in results["tasks"]:
            data.setdefault(task["name"], set()).add(task["data"]["digest"])
    differing = [name for name, digests in data.items() if len(digests) > 1]
    if differing:
        found.append(f"Prepared from other images, shots or templates from run to run: {', '.join(differing)}.")
    return found


def _differing_settings(runs: Sequence[Results]) -> list[tuple[str, list[str]]]:
    """Configuration fields whose values differ between the runs: (field, value in each run). Not their names."""
    flat = [_flat(results["config"] | {"tasks": _stream(results)}) for results in runs]
    for tree in flat:
        tree.pop("run.name", None)
    fields = dict.fromkeys(field for tree in flat for field in tree)
    rows = [(field, [tree.get(field, "–") for tree in flat]) for field in fields]
    return [(field, values) for field, values in rows if len(set(values)) > 1]


def _stream(results: Results) -> str:
    """The configured tasks in one line, with what was set of them."""
    tasks = []
    for task in results["config"]["tasks"]:
        settings = [f"{k}={v}" for k, v in task.items() if v is not None and k not in ("data", "name")]
        tasks.append(f"{task['name'] or task['data']}{' (' + ', '.join(settings) + ')' if settings else ''}")
    return ", ".join(tasks) or "the protocol's"


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(tree, dict):
        return {prefix: "default" if tree is None else str(tree)}
    return {
        f: v for key, value in tree.items() for f, v in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _in_order(values: Mapping[str, Any], order: Iterable[str]) -> dict[str, Any]:
    """Known names in their own order, then the others; results.json has them sorted."""
    known = [name for name in order if name in values]
    return {name: values[name] for name in [*known, *(n for n in values if n not in known)]}


# --- numbers as text ------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [v for v in values if v is not None]
    return sum(defined) / len(defined) if defined else None


def _percent(value: float | None) -> str:
    if value is None:
        return "–"
    text = f"{100 * value:.1f}"
    return "0.0" if text == "-0.0" else text.replace("-", "−")


def _points(value: float | None) -> str:
    """A difference in percentage points, with its sign; a true minus, as wide as the plus."""
    if value is None:
        return "–"
    text = f"{100 * value:+.1f}"
    return "±0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
