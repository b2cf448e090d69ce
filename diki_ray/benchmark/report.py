"""A benchmark as tables and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

UNITS = {"flop_per_s": (1e-9, "gflop_per_s")}


def show(report: dict[str, Any], console: Console) -> None:
    console.print(
        f"{report['model']} on {report['machine']}, {report['threads']} threads, {report['date']}; "
        f"matrix products {report['matrix_flop_per_s'] / 1e9:,.0f} GFLOP/s; "
        f"peak memory {report['peak_memory_bytes'] / 1e6:,.0f} MB",
        highlight=False,
    )
    for section, rows in report["sections"].items():
        table = Table(title=section, title_justify="left")
        shown = [{UNITS.get(k, (1, k))[1]: v * UNITS[k][0] if k in UNITS else v for k, v in r.items()} for r in rows]
        for column in shown[0]:
            table.add_column(column.replace("_", " "), justify="right", overflow="fold")
        for row in shown:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)


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
        axes.set_title(f"{report['model']}, {report['machine']}, {report['threads']} threads", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        path = folder / f"{report['model']}_{name}.svg"
        fig.savefig(path, metadata={"Date": None})
        pyplot.close(fig)
        drawn.append(path)

    def ratios(axes: Any) -> None:
        for section, mark in (("training", "o-"), ("evaluation", "s--")):
            for batch in sorted({r["batch"] for r in sections.get(section, [])}):
                rows = [r for r in sections[section] if r["batch"] == batch]
                x, y = [r["classes"] for r in rows], [r["ratio"] for r in rows]
                axes.plot(x, y, mark, label=f"{section}, batch {batch}")
        axes.set(xscale="log", xlabel="classes", ylabel="times the port's images/s", ylim=(0, None))
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.legend(fontsize=7, frameon=False)

    def ablations(axes: Any) -> None:
        rows = sections["ablation"]
        axes.barh([r["optimisation"].replace("_", " ") for r in rows], [r["without_it"] for r in rows])
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set(xlabel="time without it / with it", xscale="log")
        axes.invert_yaxis()

    def routes(axes: Any) -> None:
        rows = sections["routing"]
        for kind in ("exact", "coarse"):
            axes.plot([r["tasks"] for r in rows], [r[f"{kind}_share_of_tower"] for r in rows], "o-", label=kind)
        axes.axhline(0.1, color="grey", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="tasks", ylabel="share of the image tower's time")
        axes.legend(fontsize=7, frameon=False)

    for needs, draw in (("training", ratios), ("ablation", ablations), ("routing", routes)):
        if needs in sections:
            figure(needs, draw)
    return drawn
