"""What training took, measured: time, processor time, and each task's own peak of memory."""

from __future__ import annotations

import time

import pytest
import torch

from diki_ray.runs.train.cost import CostMeter, merged

MB = 1_000_000


def test_a_peak_is_that_of_its_own_task() -> None:
    before = CostMeter(torch.device("cpu")).read()["peak_bytes"]
    meter = CostMeter(torch.device("cpu"))
    held = torch.ones(50 * MB)  # 200 MB
    del held
    assert meter.read()["peak_bytes"] > before + 150 * MB
    after = CostMeter(torch.device("cpu")).read()["peak_bytes"]
    assert after < before + 50 * MB


def test_waiting_takes_seconds_and_no_processor() -> None:
    meter = CostMeter(torch.device("cpu"))
    time.sleep(0.2)
    cost = meter.read()
    assert cost["seconds"] >= 0.2
    assert cost["cpu_seconds"] < 0.15


def test_workers_of_one_task_wait_for_the_slowest_and_all_use_processors() -> None:
    costs = [
        {"seconds": 2.0, "cpu_seconds": 1.5, "peak_bytes": 7},
        {"seconds": 3.0, "cpu_seconds": 0.5, "peak_bytes": 5},
    ]
    assert merged(costs) == {"seconds": 3.0, "cpu_seconds": pytest.approx(2.0), "peak_bytes": 7}
