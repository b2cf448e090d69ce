"""Geometry of the report's charts: numbers in, SVG coordinates out. The template draws them and CSS colours them.

All charts share one box of WIDTH × HEIGHT user units, in which the axes leave a margin for their labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 280, 118
LEFT, RIGHT, TOP, BOTTOM = 36, 10, 10, 20


@dataclass(frozen=True)
class Tick:
    """A label at a place along an axis, in user units."""

    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Line:
    """One series: runs of neighbouring points as SVG path data, and a dot for each value that is there."""

    name: str
    path: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class LineChart:
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    mark: float | None
    """The x of the value that is marked (the epoch that was kept)."""


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Histogram:
    """Bars up from the axis for one distribution, down for the other; the means are x coordinates."""

    axis: float
    up: tuple[Bar, ...]
    down: tuple[Bar, ...]
    mean_up: float | None
    mean_down: float | None
    x_ticks: tuple[Tick, ...]


def line_chart(
    series: Sequence[tuple[str, Sequence[float | None]]],
    *,
    top: float | None = None,
    percent: bool = False,
    mark: int | None = None,
) -> LineChart:
    """Values by epoch on an axis from 0 to `top` (by default a round number above the largest value).

    Values that are missing or not finite leave a gap. mark: the number of an epoch, from 0.
    """
    known = [v for _, values in series for v in values if v is not None and math.isfinite(v)]
    top = top or _round_up(max(known, default=1.0))
    num = max((len(values) for _, values in series), default=0)

    def place(epoch: int) -> float:
        share = 0.5 if num < 2 else epoch / (num - 1)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def show(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else f"{value:.3g}"

    lines = []
    for name, values in series:
        dots: list[Dot] = []
        path, open_run = "", False
        for epoch, value in enumerate(values):
            if value is None or not math.isfinite(value):
                open_run = False
                continue
            dot = Dot(place(epoch), _height(value, top), f"{name}, epoch {epoch + 1}: {show(value)}")
            path += f"{'L' if open_run else 'M'}{dot.x} {dot.y}"
            open_run = True
            dots.append(dot)
        lines.append(Line(name, path, tuple(dots)))
    epochs = sorted({0, num - 1}) if num else []
    return LineChart(
        tuple(lines),
        tuple(Tick(place(e), str(e + 1)) for e in epochs),
        tuple(Tick(_height(v, top), f"{100 * v:.0f} %" if percent else f"{v:g}") for v in (0.0, top / 2, top)),
        None if mark is None or not 0 <= mark < num else place(mark),
    )


def histogram(up: Sequence[int], down: Sequence[int] | None, means: tuple[float | None, float | None]) -> Histogram:
    """Two distributions over [0, 1] in equal bins, each in shares of its own total, on one scale."""
    down = down or ()
    shares = [_shares(up), _shares(down)]
    largest = max((s for part in shares for s in part), default=0.0) or 1.0
    axis = (TOP + HEIGHT - BOTTOM) / 2 if down else HEIGHT - BOTTOM
    room = axis - TOP

    def bars(counts: Sequence[int], part: Sequence[float], downwards: bool) -> tuple[Bar, ...]:
        step = (WIDTH - LEFT - RIGHT) / max(len(counts), 1)
        return tuple(
            Bar(
                round(LEFT + i * step + 0.5, 1),
                round(axis if downwards else axis - room * share / largest, 1),
                round(step - 1, 1),
                round(room * share / largest, 1),
                f"{i / len(counts):.2f} to {(i + 1) / len(counts):.2f}: {count} images, {100 * share:.0f} %",
            )
            for i, (count, share) in enumerate(zip(counts, part, strict=True))
            if count
        )

    def across(value: float) -> float:
        return round(LEFT + value * (WIDTH - LEFT - RIGHT), 1)

    return Histogram(
        axis,
        bars(up, shares[0], False),
        bars(down, shares[1], True),
        None if means[0] is None else across(means[0]),
        None if means[1] is None else across(means[1]),
        x_ticks=tuple(Tick(across(v), f"{v:g}") for v in (0.0, 0.5, 1.0)),
    )


def _height(value: float, top: float) -> float:
    return round(HEIGHT - BOTTOM - min(value / top, 1.0) * (HEIGHT - BOTTOM - TOP), 1)


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [count / total if total else 0.0 for count in counts]


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 4, 5, 8, 10 times a power of ten: halves of it are short numbers."""
    if not value > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 2.5, 4, 5, 8, 10) if value <= m * power * (1 + 1e-9))
