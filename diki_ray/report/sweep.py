"""The report of a sweep: one HTML page with interactive charts that needs no network and no other file.

The charts are Plotly's, whose script (5 MB) is inside the page. A content security policy in the page allows nothing
from elsewhere. Names and values of settings are other people's text: Jinja escapes them, and `_safe` those in charts.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
import plotly.graph_objects as go
import plotly.io
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from diki_ray.config import Config
from diki_ray.config.sweep import plain, setting_text
from diki_ray.report.sweep_table import (
    COSTS,
    baselines_text,
    best_first,
    columns_of,
    costs,
    how_it_was_made,
    outcome,
    percent,
)

AXES = ("weight_auroc", "transfer", "average", "last", "objective")
MAX_BOXES = 12
"""Settings whose distribution over orders is shown, best first."""
MAX_NUMBERED = 30
LAYOUT = {"template": "plotly_white", "margin": {"l": 60, "r": 30, "t": 30, "b": 50}, "height": 420}

Document = Mapping[str, Any]


def render(document: Document) -> str:
    """The page for a sweep's document."""
    charts = {
        "parallel": parallel_coordinates(document),
        "pareto": pareto(document),
        "orders": over_orders(document),
        "effects": effects(document),
        "cost": cost(document),
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((files("diki_ray.report") / "sweep.html.j2").read_text("utf-8"))
    columns = columns_of(document)
    return template.render(
        document=document,
        settings=best_first(document),
        without=[t for t in document["trials"] if not t["validation"]],
        columns=columns,
        test_columns=("zero_shot", *columns[1:]),
        made=how_it_was_made(document),
        baselines=baselines_text(document),
        cost_columns=list(COSTS.values()),
        costs=costs,
        text=setting_text,
        percent=percent,
        outcome=outcome,
        yaml=Config.model_validate(document["config"]).to_yaml(),
        script=Markup(get_plotlyjs()),
        charts={name: _html(name, figure) for name, figure in charts.items()},
    )


def parallel_coordinates(document: Document) -> go.Figure:
    """A line for each setting, through its values and its means; drag along an axis to choose some."""
    trials = best_first(document)
    dimensions = [_axis(document, name, [plain(t["setting"][name]) for t in trials]) for name in _varied(document)]
    for metric in AXES:
        values = [t["validation"][metric]["mean"] for t in trials]
        if None not in values:
            dimensions.append({"label": metric.replace("_", " "), "values": [100 * v for v in values]})
    objective = [100 * t["validation"]["objective"]["mean"] for t in trials]
    line = {"color": objective, "colorscale": "Viridis", "showscale": True, "colorbar": {"title": "objective, %"}}
    return go.Figure(
        go.Parcoords(dimensions=dimensions, line=line), LAYOUT | {"margin": {"l": 90, "r": 60, "t": 60, "b": 30}}
    )


def pareto(document: Document) -> go.Figure:
    """Transfer against Last with their standard deviations; the front is what no setting beats in both."""
    trials = [t for t in best_first(document) if t["validation"]["transfer"]["mean"] is not None]
    figure = go.Figure(layout=LAYOUT | {"xaxis_title": "Transfer, %", "yaxis_title": "Last, %"})
    front = sorted((t for t in trials if t["setting"] in document["pareto"]), key=lambda t: _mean(t, "transfer"))
    x, y = [_mean(t, "transfer") for t in front], [_mean(t, "last") for t in front]
    figure.add_scatter(
        x=x, y=y, mode="lines", name="Pareto front", line={"dash": "dot", "color": "#888"}, hoverinfo="skip"
    )
    chosen = document["chosen"]["setting"]
    for name, group, symbol in (
        ("settings", [t for t in trials if t["setting"] != chosen], "circle"),
        ("chosen", [t for t in trials if t["setting"] == chosen], "star"),
    ):
        figure.add_scatter(
            x=[_mean(t, "transfer") for t in group],
            y=[_mean(t, "last") for t in group],
            error_x={"array": [_std(t, "transfer") for t in group], "thickness": 0.5},
            error_y={"array": [_std(t, "last") for t in group], "thickness": 0.5},
            **_numbered(document, group),
            name=name,
            marker={"size": 11, "symbol": symbol},
            hovertext=[_safe(setting_text(t["setting"])) for t in group],
            hovertemplate="%{hovertext}<br>Transfer %{x:.2f} %, Last %{y:.2f} %<extra></extra>",
        )
    return figure


def cost(document: Document) -> go.Figure:
    """Seconds that training a stream takes against Average; points are larger with more trained parameters."""
    trials = [t for t in best_first(document) if "cost" in t["validation"]]
    costs_of = [t["validation"]["cost"] for t in trials]
    figure = go.Figure(layout=LAYOUT | {"xaxis_title": COSTS["train_s"], "yaxis_title": "Average, %"})
    figure.add_scatter(
        x=[c["train_s"] for c in costs_of],
        y=[_mean(t, "average") for t in trials],
        error_y={"array": [_std(t, "average") for t in trials], "thickness": 0.5},
        **_numbered(document, trials),
        marker={"size": [8 + 2 * math.log10(1 + c["num_parameters"]) for c in costs_of]},
        hovertext=[_safe(setting_text(t["setting"])) for t in trials],
        customdata=[[f"{c['num_parameters']:,}"] for c in costs_of],
        hovertemplate="%{hovertext}<br>%{x:.1f} s, Average %{y:.2f} %, %{customdata[0]} parameters<extra></extra>",
    )
    return figure


def over_orders(document: Document) -> go.Figure:
    """Transfer, Average and Last of the best settings, a point for each order and seed."""
    title = {"boxmode": "group", "yaxis_title": "%", "xaxis_title": "setting, by its number in the table below"}
    figure = go.Figure(layout=LAYOUT | title)
    trials = best_first(document)[:MAX_BOXES]
    for metric in ("transfer", "average", "last"):
        points = [
            (str(n), 100 * v[metric], _safe(f"{setting_text(t['setting'])}; order {v['order']}, seed {v['seed']}"))
            for n, t in enumerate(trials, 1)
            for v in t["validation"]["values"]
            if v[metric] is not None
        ]
        figure.add_box(
            x=[p[0] for p in points],
            y=[p[1] for p in points],
            text=[p[2] for p in points],
            name=metric,
            boxpoints="all",
            jitter=0.4,
            pointpos=0,
            marker={"size": 3},
        )
    return figure


def effects(document: Document) -> go.Figure:
    """The objective by each field that varies, over everything else; a menu chooses the field."""
    fields = _varied(document)
    figure = go.Figure(layout=LAYOUT | {"yaxis_title": "objective, %", "showlegend": False})
    buttons = []
    for field in fields:
        pairs = [(plain(t["setting"][field]), t) for t in best_first(document)]
        pairs.sort(key=lambda pair: _rank(pair[0]))
        values, trials = [value for value, _ in pairs], [trial for _, trial in pairs]
        many = _are_numbers(values) and len(set(values)) > 6
        figure.add_trace(
            (go.Scatter if many else go.Box)(
                x=values if many else [_safe(str(v)) for v in values],
                y=[_mean(t, "objective") for t in trials],
                text=[_safe(setting_text(t["setting"])) for t in trials],
                visible=field == fields[0],
                **({"mode": "markers"} if many else {"boxpoints": "all", "jitter": 0.3, "pointpos": 0}),
            )
        )
        kind = ("log" if _is_log(document, field) else "linear") if many else "category"
        axis = {"xaxis.title.text": _safe(field), "xaxis.type": kind}
        shown = {"visible": [f == field for f in fields]}
        buttons.append({"label": _safe(field), "method": "update", "args": [shown, axis]})
    if buttons:
        figure.update_layout(
            buttons[0]["args"][1], updatemenus=[{"buttons": buttons, "x": 0, "y": 1.15, "xanchor": "left"}]
        )
    return figure


def _varied(document: Document) -> list[str]:
    return list(document["sweep"]["parameters"])


def _axis(document: Document, name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Numbers as they are; words, and numbers mixed with words, at places of their own."""
    if _is_log(document, name):
        return {"label": f"log10 {_safe(name)}", "values": [math.log10(v) for v in values]}
    if _are_numbers(values):
        return {"label": _safe(name), "values": list(values)}
    words = [str(v) for v in sorted(set(values), key=_rank)]
    return {
        "label": _safe(name),
        "values": [words.index(str(v)) for v in values],
        "tickvals": list(range(len(words))),
        "ticktext": [_safe(w) for w in words],
    }


def _is_log(document: Document, name: str) -> bool:
    values = document["sweep"]["parameters"][name]
    return isinstance(values, dict) and values["log"]


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _rank(value: Any) -> tuple[bool, Any]:
    """Numbers first, then everything else as text."""
    return (False, value) if _are_numbers([value]) else (True, str(value))


def _numbered(document: Document, trials: Sequence[Document]) -> dict[str, Any]:
    """Points with the settings' numbers in the table of all, where there are not too many to be read."""
    if len(best_first(document)) > MAX_NUMBERED:
        return {"mode": "markers"}
    numbers = [t["setting"] for t in best_first(document)]
    text = [str(numbers.index(t["setting"]) + 1) for t in trials]
    return {"mode": "markers+text", "text": text, "textposition": "top right"}


def _mean(trial: Document, metric: str) -> float:
    return 100 * trial["validation"][metric]["mean"]


def _std(trial: Document, metric: str) -> float:
    return 100 * (trial["validation"][metric]["std"] or 0.0)


def _safe(text: str) -> str:
    """Plotly reads some tags in its labels."""
    return html.escape(text, quote=False)


def _html(name: str, figure: go.Figure) -> Markup:
    return Markup(
        plotly.io.to_html(figure, full_html=False, include_plotlyjs=False, div_id=name, config={"responsive": True})
    )
