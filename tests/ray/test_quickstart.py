"""What the quickstart shows, on the test splits, as a user runs it."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from job_process import run_job


@pytest.fixture(scope="module", params=["quickstart_one_pass", pytest.param("quickstart", marks=pytest.mark.long)])
def quickstart(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """`make test` has time for the one that trains nothing."""
    folder = tmp_path_factory.mktemp("quickstart")
    places = (f"run.storage={folder}/runs", f"data.root={folder}/prepared")
    started = time.monotonic()
    done = run_job("continual", "--config", request.param, *places, timeout_s=900, OMP_NUM_THREADS=None)
    print(f"{request.param} took {time.monotonic() - started:.0f} s; on 2 free cores at most 60 s, 120 s with training")
    (run,) = (folder / "runs/runs").iterdir()
    results = json.loads((run / "results/results.json").read_text())
    return results | {"stdout": done.stdout, "trained": request.param == "quickstart"}


@pytest.mark.timeout(1000)
def test_quickstart_keeps_zero_shot_forgets_nothing_and_learns(quickstart: dict) -> None:
    zero_shot, metrics = np.array(quickstart["zero_shot"]), quickstart["metrics"]
    assert len(zero_shot) >= 5
    assert metrics["forgetting"]["mean"] <= 0.005
    assert metrics["last"]["mean"] >= (0.94 if quickstart["trained"] else 0.933)
    transfer = np.array(metrics["transfer"]["per_task"][1:], float)
    assert abs(transfer.mean() - zero_shot[1:].mean()) <= 0.001
    assert np.mean(np.array(metrics["last"]["per_task"]) - zero_shot) >= 0.20


@pytest.mark.timeout(1000)
def test_transfer_means_something_and_routing_is_by_domain(quickstart: dict) -> None:
    late = quickstart["zero_shot"][-2:]
    chance = [t["chance"] for t in quickstart["tasks"]]
    assert min(late) > 0.5 > max(chance)
    for j, task in enumerate(quickstart["tasks"]):
        assert task["routed"]["tasks"][j] / task["num_test"] > 0.99
        assert task["weights"]["learnt"]["mean"] > 0.9
    assert quickstart["notes"]["text_feature_error"] < 0.05


@pytest.mark.timeout(1000)
def test_progress_is_readable_in_a_log_and_says_what_to_do_next(quickstart: dict) -> None:
    said = quickstart["stdout"]
    if quickstart["trained"]:
        assert "[1/6] chessboard  epoch 1/7  loss " in said
        assert "left for this task" in said
    for words in ("(random chance)", "nothing: zero-shot", "run again", "add a task", "predict", "open the report"):
        assert words in said
