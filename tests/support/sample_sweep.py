"""A sweep's document made by hand: two settings with a result, one that failed, one that was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diki_ray.config import load
from diki_ray.runs.sweep.trial import METRICS, spread

HOSTILE = "</script><img src=x onerror='window.hostileRan=true'>"
ROOT = Path(__file__).parents[2]


def judged(transfer: float, last: float) -> dict[str, Any]:
    values = []
    for n in range(4):
        metrics = dict.fromkeys(METRICS, 0.5) | {"transfer": transfer + n / 100, "last": last}
        values.append({"order": f"o{n}", "seed": 0} | metrics)
    spreads = {m: spread([v[m] for v in values]) for m in METRICS}
    mean = (transfer + 0.015 + last + 0.5) / 3
    return spreads | {
        "objective": {"mean": mean, "std": 0.01},
        "values": values,
        "orders_by": "indexing",
        "cost": {
            "num_parameters": 1234,
            "num_bytes": 56789,
            "train_s": 0.5,
            "train_cpu_s": 0.75,
            "peak_mb": 321,
            "evaluate_s": 0.25,
            "images_per_s": 98.5,
        },
        "chance": 0.125,
        "seconds": {"train": 1.0, "tables": 2.0, "orders": 0.1},
    }


def trial(setting: dict[str, Any], **fields: Any) -> dict[str, Any]:
    ended = {"validation": None, "error": None, "stopped_at_epoch": None, "num_tried": 1, "number": 0}
    return {"setting": setting} | ended | fields


def sample_sweep() -> dict[str, Any]:
    parameters = {"calibration.bias": [-1.0, 1.0], "run.storage": ["a", HOSTILE]}
    trials = [
        trial({"calibration.bias": -1.0, "run.storage": "a"}, validation=judged(0.3, 0.9)),
        trial({"calibration.bias": 1.0, "run.storage": HOSTILE}, validation=judged(0.4, 0.8)),
        trial({"calibration.bias": -1.0, "run.storage": HOSTILE}, error=f"no {HOSTILE}"),
        trial({"calibration.bias": 1.0, "run.storage": "a"}, stopped_at_epoch=1.5),
    ]
    return {
        "sweep": {"name": "hand", "parameters": parameters, "seeds": [0]},
        "config": load(ROOT / "configs/debug.yaml").model_dump(mode="json"),
        "tasks": ["a", "b"],
        "orders": {f"o{n}": [0, 1] for n in range(4)},
        "trials": trials,
        "pareto": [trials[0]["setting"], trials[1]["setting"]],
        "chosen": {"setting": trials[1]["setting"], "validation": trials[1]["validation"], "test": judged(0.35, 0.85)},
        "modules_trained": 2,
        "seconds": 12.0,
        "finished_at": "2026-11-25T00:00:00+0000",
    }
