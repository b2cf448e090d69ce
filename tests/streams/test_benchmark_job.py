"""The benchmark runs at its smallest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from job_process import run_job

SECTIONS = [
    *("training", "evaluation", "ablation", "stream", "growth", "routing", "class_model"),
    *("input", "scaling", "memory", "layout", "decoding", "store"),
    *("start", "serving", "serving_stages", "prediction"),
]
PLOTS = ("classes", "batches", "ablation", "routing")


def measured(tmp_path: Path, *more: object) -> tuple[dict[str, Any], str]:
    """The sections of the benchmark at its smallest, and what it printed. It stops by itself when port and platform
    compute different losses or answers."""
    sizes = ["--classes", "4", "--batch", "8", "16", "--rounds", "1", "--tasks", "3", "--stream-classes", "3"]
    fixed = [
        "--routing-tasks",
        "5",
        "70",
        "--modules",
        "2",
        "4",
        "--seconds",
        "0.5",
        "--images",
        "600",
        "--threads",
        "1",
        "--output",
        tmp_path,
    ]
    done = run_job("benchmark", "--model", "debug", "--device", "cpu", *sizes, *fixed, *more, timeout_s=800)
    sections = json.loads((tmp_path / "debug.json").read_text())["sections"]
    assert all(title in done.stdout for title in sections)
    return sections, (tmp_path / "debug.md").read_text()


@pytest.mark.long
def test_the_benchmark_at_its_smallest_writes_a_table_json_and_plots(tmp_path: Path) -> None:
    few = ["training", "evaluation", "routing", "class_model", "store"]
    sections, page = measured(tmp_path, "--sections", *few)
    assert list(sections) == few
    for row in sections["training"]:
        assert 0 < row["text_share"] < 2  # two times, taken one after the other on a machine that does other work
        assert row["fraction_of_matrix_throughput"] > 0
    assert {r["same_route"] for r in sections["routing"]} == {1.0}
    assert [r["classes"] for r in sections["class_model"]] == [100, 1400]
    assert [r["modules"] for r in sections["store"]] == [2, 4]
    assert {p.name for p in tmp_path.glob("*.svg")} == {f"debug_{n}.svg" for n in PLOTS if n != "ablation"}
    assert page.count("| classes | batch | images per s |") == 2


@pytest.mark.long
@pytest.mark.timeout(900)
def test_all_of_the_benchmark_at_its_smallest(tmp_path: Path) -> None:
    sections, page = measured(tmp_path)
    assert list(sections) == SECTIONS
    assert {r["optimisation"] for r in sections["ablation"]} > {
        *("trim", "shared_beginning", "last_block_for_one_token", "no_frozen_pass", "class_tables")
    }
    assert all(0 <= r["idle_share"] <= 1 for r in sections["input"])
    assert [r["density"] for r in sections["growth"]] == ["task", "classes"]
    assert all(r["images_decoded_for_one_more"] < r["images"] for r in sections["growth"])
    assert sections["scaling"][0]["speedup"] > 0
    assert [(r["of"], r["mb"] > 0, r["port_mb"] > 0) for r in sections["memory"]] == [
        ("training", True, True),
        ("evaluation", True, True),
    ]
    assert {r["of"] for r in sections["serving"]} == {"served", "app", "plain", "engine"}
    assert [(r["jpeg_px"], r["workers"]) for r in sections["prediction"]] == [(64, 1), (64, 2), (500, 1), (500, 2)]
    assert all(0 < r["computing_share"] <= 1 for r in sections["prediction"])
    assert {p.name for p in tmp_path.glob("*.svg")} == {f"debug_{n}.svg" for n in PLOTS}
    assert all(f"### debug: {section}\n" in page for section in SECTIONS)


@pytest.mark.long
def test_a_stream_of_tiny_tasks_and_a_short_day_of_a_server(tmp_path: Path) -> None:
    few = ["--stream-of", "12", "--served-tasks", "6", "--requests", "60"]
    sections, _ = measured(tmp_path, "--sections", "many_tasks", "serving_day", *few)
    stream, day = sections["many_tasks"], sections["serving_day"]
    assert stream[-1]["tasks"] == 12
    assert all(row["driver_mb"] > 0 and row["store_mb"] > 0 for row in stream)
    assert any(row["worker_mb"] > 0 for row in stream)
    assert [(r["replicas"], r["when"]) for r in day if not r["when"].endswith("asked")] == [
        (replicas, when) for replicas in (1, 2) for when in ("first answers", "at rest", "learning")
    ]
    assert sum(r["requests"] for r in day if r["when"].endswith("asked")) >= 60
    assert all(row[of] > 0 for row in day for of in ("replica_mb", "model_mb", "front_mb"))
