"""A benchmark as tables, for a terminal and for a page, and as plots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

UNITS = {"flop_per_s": (1e-9, "gflop_per_s")}


def headline(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"{report['model']} on {report['machine']}, {_threads(report)}, {report['date']}; {versions}; "
        f"matrix products {report['matrix_flop_per_s'] / 1e9:,.0f} GFLOP/s; "
        f"peak memory {report['peak_memory_bytes'] / 1e6:,.0f} MB; took {sum(report['seconds'].values()):,.0f} s"
    )


def tables(report: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(section, columns, rows as text)."""
    for section, rows in report["sections"].items():
        shown = [{UNITS.get(k, (1, k))[1]: v * UNITS[k][0] if k in UNITS else v for k, v in r.items()} for r in rows]
        columns = [column.replace("_", " ") for column in shown[0]]
        yield section, columns, [[_text(v) for v in r.values()] for r in shown]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(report: dict[str, Any], console: Console) -> None:
    console.print(headline(report), highlight=False)
    for section, columns, rows in tables(report):
        table = Table(title=section, title_justify="left")
        for column in columns:
            table.add_column(column, justify="right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def markdown(report: dict[str, Any]) -> str:
    """The same tables as a part of a page in docs/."""
    lines = [
        f"## {report['model']}: {', '.join(report['sections'])}",
        "",
        f"{headline(report)}.",
        "",
        "```",
        report["command"],
        "```",
        "",
    ]
    for section, columns, rows in tables(report):
        lines += [f"### {report['model']}: {section}", "", f"It took {report['seconds'][section]:,.0f} s.", ""]
        lines += [f"| {' | '.join(cells)} |" for cells in (columns, ["---:"] * len(columns), *rows)]
        lines.append("")
    return "\n".join(lines)


def plot(report: dict[str, Any], folder: Path) -> list[Path]:
    """One SVG for each section that has a picture; their paths."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "diki_ray"
    from matplotlib import pyplot

    sections, drawn = report["sections"], []

    def figure(name: str, draw: Any) -> None:
        fig, axes = pyplot.subplots(figsize=(5.5, 3.2), layout="constrained")
        draw(axes)
        axes.minorticks_off()
        axes.set_title(f"{report['model']}, {report['machine']}, {_threads(report)}", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        path = folder / f"{report['model']}_{name}.svg"
        fig.savefig(path, metadata={"Date": None})
        pyplot.close(fig)
        drawn.append(path)

    def ratios(axes: Any, over: str, at: str) -> None:
        """The ratios along one of classes and batch, for the value of the other with most measurements."""
        for section, mark in (("training", "o-"), ("evaluation", "s--")):
            rows = sections.get(section, [])
            values = [r[at] for r in rows]
            if rows:
                fixed = max(values, key=values.count)
                line = sorted((r[over], r["ratio"]) for r in rows if r[at] == fixed)
                axes.plot(*zip(*line, strict=True), mark, label=f"{section}, {at} {fixed}")
        axes.set(xscale="log", xlabel=over, ylabel="times the port's images/s", ylim=(0, None))
        measured_at(axes, line)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.legend(fontsize=7, frameon=False)

    def measured_at(axes: Any, line: Sequence[tuple[float, float]]) -> None:
        axes.set_xticks([x for x, _ in line], [f"{x:,}" for x, _ in line])

    def ablations(axes: Any) -> None:
        rows = sections["ablation"]
        names = [f"{r['optimisation'].replace('_', ' ')} ({r['of']})" for r in rows]
        bars = axes.barh(names, [r["without_it"] - 1 for r in rows], left=1)
        axes.bar_label(bars, [f"{r['without_it']:.2f}" for r in rows], padding=3, fontsize=7)
        axes.set(xlabel="time without it / with it", xscale="log")
        axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        axes.tick_params(axis="y", labelsize=7)
        axes.invert_yaxis()

    def routes(axes: Any) -> None:
        rows = sections["routing"]
        for kind in ("exact", "coarse"):
            line = [(r["tasks"], r[f"{kind}_share_of_tower"]) for r in rows]
            axes.plot(*zip(*line, strict=True), "o-", label=kind)
        axes.axhline(0.1, color="grey", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="tasks", ylabel="share of the image tower's time")
        measured_at(axes, line)
        axes.legend(fontsize=7, frameon=False)

    def tasks(axes: Any) -> None:
        rows = [r for r in sections["many_tasks"] if r["s_a_task"] is not None]
        for column, mb in rows[0].items():
            if column.endswith("_mb") and mb:
                axes.plot([r["tasks"] for r in rows], [r[column] for r in rows], "o-", label=column.removesuffix("_mb"))
        axes.set(xlabel="tasks learnt", ylabel="MB resident", ylim=(0, None))
        seconds = axes.twinx()
        seconds.plot([r["tasks"] for r in rows], [r["s_a_task"] for r in rows], "k--", label="s a task (right)")
        seconds.set(ylim=(0, None))
        lines = axes.get_lines() + seconds.get_lines()
        axes.legend(lines, [line.get_label() for line in lines], fontsize=7, frameon=False)

    def day(axes: Any) -> None:
        rows = [r for r in sections["serving_day"] if r["when"].endswith("asked")]
        asked = list(accumulate(r["requests"] for r in rows))
        for column in ("replica_mb", "model_mb", "front_mb"):
            axes.plot(asked, [r[column] for r in rows], "o-", label=column.removesuffix("_mb"))
        axes.set(xlabel="requests answered", ylabel="MB resident", ylim=(0, None))
        axes.legend(fontsize=7, frameon=False)

    if "training" in sections or "evaluation" in sections:
        figure("classes", lambda axes: ratios(axes, "classes", "batch"))
        figure("batches", lambda axes: ratios(axes, "batch", "classes"))
    for name, draw in (("ablation", ablations), ("routing", routes), ("many_tasks", tasks), ("serving_day", day)):
        if name in sections:
            figure(name, draw)
    return drawn


def _threads(report: dict[str, Any]) -> str:
    return "1 thread" if report["threads"] == 1 else f"{report['threads']} threads"
