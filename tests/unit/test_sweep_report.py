"""A sweep's report and tables, made of a document by hand with other people's text in it."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import parquet
from rich.console import Console
from sample_sweep import HOSTILE, ROOT, judged, sample_sweep, trial

from diki_ray.commands.output import WIDTH_IN_A_PIPE
from diki_ray.config import load, parse
from diki_ray.config.sweep import varied
from diki_ray.report.sweep import cost, effects, over_orders, parallel_coordinates, pareto
from diki_ray.report.sweep_table import sweep_tables
from diki_ray.runs.sweep.files import CHOSEN, DOCUMENT, REPORT, write_files
from diki_ray.runs.sweep.results import SweepResults


@pytest.fixture
def document() -> dict[str, Any]:
    return sample_sweep()


def written(document: dict[str, Any], folder: Path) -> Path:
    results = SweepResults(str(folder), "hand", "q")
    write_files(document, varied(load(ROOT / "configs/debug.yaml"), {"calibration.bias": 1.0}), results)
    return folder / "sweeps/hand"


def test_tables_say_every_setting_and_every_value(document: dict[str, Any], tmp_path: Path) -> None:
    folder = written(document, tmp_path)
    settings = list(csv.DictReader(io.StringIO((folder / "settings.csv").read_text())))
    assert [s["chosen"] for s in settings] == ["false", "true", "false", "false"]
    assert [s["pareto"] for s in settings] == ["true", "true", "false", "false"]
    assert float(settings[0]["transfer"]) == pytest.approx(0.315)
    assert (settings[2]["error"], settings[3]["stopped_at_epoch"]) == (f"no {HOSTILE}", "1.5")
    values = parquet.read_table(folder / "values.parquet").to_pylist()
    assert len(values) == 3 * 4
    assert values[0]["tasks"] == "a b"
    assert [v["transfer"] for v in values if v["split"] == "test"] == pytest.approx([0.35, 0.36, 0.37, 0.38])
    assert json.loads((folder / DOCUMENT).read_text()) == document


def test_a_column_of_numbers_and_words_is_text(document: dict[str, Any], tmp_path: Path) -> None:
    document["trials"][0]["setting"]["calibration.bias"] = "default"
    settings = parquet.read_table(written(document, tmp_path) / "settings.parquet").to_pylist()
    assert [s["calibration.bias"] for s in settings] == ["default", "1.0", "-1.0", "1.0"]


def test_a_whole_section_may_vary(document: dict[str, Any], tmp_path: Path) -> None:
    document["sweep"]["parameters"] = {"calibration": []}
    for n, t in enumerate(document["trials"]):
        t["setting"] = {"calibration": {"form": "published", "bias": float(n)}}
    document["pareto"], document["chosen"]["setting"] = [], document["trials"][1]["setting"]
    folder = written(document, tmp_path)
    assert "form:published bias:1" in (folder / REPORT).read_text()
    assert parquet.read_table(folder / "settings.parquet").to_pylist()[0]["calibration"] == "form:published bias:0"


def test_the_chosen_configuration_is_ready_to_run(document: dict[str, Any], tmp_path: Path) -> None:
    chosen = parse(yaml.safe_load((written(document, tmp_path) / CHOSEN).read_text()))
    assert chosen.calibration.bias == 1.0
    assert chosen.run.name == "hand-chosen"


def test_the_page_needs_nothing_and_runs_nothing_of_others(document: dict[str, Any], tmp_path: Path) -> None:
    page = (written(document, tmp_path) / REPORT).read_text()
    head, _, body = page.partition("<body>")
    assert "default-src 'none'" in head
    assert body.count("Plotly.newPlot") == 5
    assert "<img" not in body
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", head[:2000] + body)
    assert "stopped early, after 1.5 epochs" in body
    assert "every order by indexing" in body


def test_charts_show_what_they_say(document: dict[str, Any]) -> None:
    lines = parallel_coordinates(document).data[0]
    assert sorted(lines.dimensions[0].values) == [-1.0, 1.0]
    assert list(lines.dimensions[1].ticktext) == [
        "&lt;/script&gt;&lt;img src=x onerror='window.hostileRan=true'&gt;",
        "a",
    ]
    assert len(lines.dimensions) == 2 + 5
    front = pareto(document).data[0]
    assert list(front.x) == pytest.approx([31.5, 41.5])
    assert list(front.y) == pytest.approx([90, 80])
    boxes = over_orders(document).data
    assert [box.name for box in boxes] == ["transfer", "average", "last"]
    assert len(boxes[0].y) == 8  # two settings, four orders
    chart = effects(document)
    assert [t.visible for t in chart.data] == [True, False]
    assert len(chart.layout.updatemenus[0].buttons) == 2


def test_a_logarithmic_range_has_a_logarithmic_axis(document: dict[str, Any]) -> None:
    document["sweep"]["parameters"] = {"train.lr": {"low": 1e-4, "high": 1.0, "log": True, "integer": False}}
    document["trials"] = [
        trial({"train.lr": 10.0 ** -(n / 2)}, validation=judged(0.3 + n / 100, 0.9)) for n in range(8)
    ]
    assert max(parallel_coordinates(document).data[0].dimensions[0]["values"]) == 0
    chart = effects(document)
    assert chart.layout.xaxis.type == "log"
    assert chart.data[0].mode == "markers"


def test_a_sweep_of_one_setting_has_a_page_too(document: dict[str, Any], tmp_path: Path) -> None:
    document["sweep"]["parameters"] = {}
    document["trials"] = [trial({}, validation=judged(0.3, 0.9))]
    document["trials"][0]["validation"]["transfer"] = {"mean": None, "std": None}
    document["chosen"]["setting"], document["pareto"] = {}, [{}]
    assert "as configured" in (written(document, tmp_path) / REPORT).read_text()


def test_the_console_says_it_too(document: dict[str, Any]) -> None:
    console = Console(width=200, record=True, quiet=False, file=io.StringIO())
    for table in sweep_tables(document):
        console.print(table)
    text = console.export_text()
    assert "41.5 ± 1.3" in text
    assert "what they cost" in text
    assert "56,789" in text
    assert "without a result" in text


def test_no_word_of_a_setting_is_cut_off_in_a_pipe(document: dict[str, Any]) -> None:
    document["trials"][0]["setting"] = {"method": {"name": "sequential_lora", "rank": 4, "against_forgetting": "badam"}}
    document["trials"][0]["validation"]["cost"]["num_bytes"] = 25_457_928
    console = Console(width=WIDTH_IN_A_PIPE, record=True, file=io.StringIO())
    console.print(*sweep_tables(document))
    assert console.export_text().count("against_forgetting:badam") == 2


def test_costs_and_what_to_read_them_against_are_beside_every_setting(document: dict[str, Any], tmp_path: Path) -> None:
    page = (written(document, tmp_path) / REPORT).read_text()
    assert "<td>1,234</td><td>56,789</td><td>0.5</td><td>0.75</td><td>321</td><td>0.25</td><td>98.5</td>" in page
    assert "zero-shot 50.0 ± 0.0, chance 12.5" in page
    points = cost(document).data[0]
    assert list(points.x) == [0.5, 0.5]
    assert list(points.text) == ["1", "2"]  # the numbers of the table
    rows = list(csv.DictReader(io.StringIO((tmp_path / "sweeps/hand/settings.csv").read_text())))
    assert (rows[0]["num_parameters"], rows[0]["images_per_s"], rows[0]["peak_mb"]) == ("1234", "98.5", "321")


def test_a_cost_that_is_not_known_is_a_dash(document: dict[str, Any], tmp_path: Path) -> None:
    """Of modules that an earlier version trained nobody measured the training."""
    document["trials"][0]["validation"]["cost"] |= {"train_s": None, "train_cpu_s": None, "peak_mb": None}
    page = (written(document, tmp_path) / REPORT).read_text()
    assert "<td>56,789</td><td>–</td><td>–</td><td>–</td><td>0.25</td>" in page


def test_cases_with_fields_of_their_own_have_rows_and_a_page(document: dict[str, Any], tmp_path: Path) -> None:
    document["sweep"]["parameters"] = {}
    cases = [{"method": {"name": "zero_shot"}}, {"method": {"name": "rail", "hidden_dim": 8}, "train.lr": 0.1}]
    document["trials"] = [trial(case, validation=judged(0.3, 0.9)) for case in cases]
    document["chosen"]["setting"], document["pareto"] = cases[0], [cases[0]]
    folder = written(document, tmp_path)
    rows = list(csv.DictReader(io.StringIO((folder / "settings.csv").read_text())))
    assert [row["train.lr"] for row in rows] == ["", "0.1"]
    assert "hidden_dim" in rows[1]["method"]
    page = (folder / REPORT).read_text()
    assert "rail" in page
    assert "Effect of each field" not in page
