"""Charts of a report: gaps where a value is missing, and nothing outside of the box."""

from __future__ import annotations

from diki_ray.report import charts


def test_a_line_has_a_gap_where_a_value_is_missing() -> None:
    chart = charts.line_chart([("loss", [1.0, None, 0.5, float("inf"), 0.25, 0.2])], mark=5)
    (line,) = chart.lines
    assert line.path.count("M") == 3
    assert line.path.count("L") == 1
    assert len(line.dots) == 4
    assert chart.mark == line.dots[-1].x
    assert [t.label for t in chart.y_ticks] == ["0", "0.5", "1"]
    assert [t.label for t in chart.x_ticks] == ["1", "6"]


def test_charts_stay_in_their_box() -> None:
    everything = (
        charts.line_chart([("a", [0.0, 1e9, 3.3, -1.0])]),
        charts.line_chart([("a", [])]),
        charts.line_chart([]),
    )
    for chart in everything:
        assert all(0 <= d.x <= charts.WIDTH and d.y <= charts.HEIGHT for line in chart.lines for d in line.dots)
    histogram = charts.histogram([0, 10, 0, 90], [100, 0, 0, 0], (0.8, 0.1))
    assert sum(bar.height for bar in histogram.up) < max(bar.height for bar in histogram.down) * 1.01  # one scale
    assert all(bar.y >= 0 and bar.y + bar.height <= charts.HEIGHT for bar in (*histogram.up, *histogram.down))
    assert charts.histogram([0, 0], None, (None, None)).up == ()
