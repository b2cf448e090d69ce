"""What a setting costs, beside what it reaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diki_ray.model.methods import METHODS
from diki_ray.model.module import TaskModule
from diki_ray.runtime.plan import Plan
from diki_ray.runtime.store import RunStore

COSTS = {
    "num_parameters": "trained parameters a task",
    "num_bytes": "stored bytes of a stream",
    "train_s": "training of a stream, s",
    "evaluate_s": "evaluation of an order, s",
}


def cost_of(
    plan: Plan, digests: list[str], seconds: Mapping[str, float], num_streams: int, num_orders: int
) -> dict[str, Any]:
    """From one plan's modules, and the seconds that all streams and orders of the setting took together (modules that
    were in the library already cost nothing)."""
    store = RunStore.open(plan.config.run.storage, "library")
    blobs = [store.read_module(digest) for digest in digests]
    is_trained = METHODS[plan.config.method.name].is_trained
    sizes = [
        sum(p.size for name, p in TaskModule.from_bytes(blob).parameters.items() if is_trained(name)) for blob in blobs
    ]
    return {
        "num_parameters": round(sum(sizes) / len(sizes)),
        "num_bytes": sum(len(blob) for blob in blobs),
        "train_s": round(seconds["train"] / num_streams, 2),
        "evaluate_s": round((seconds["tables"] + seconds["orders"]) / num_orders, 2),
    }


def costs(trial: Mapping[str, Any]) -> list[str]:
    """Of one setting, for people, in the order of `COSTS`; results of earlier versions have none."""
    known = trial["validation"].get("cost", {})
    return [f"{known[name]:,}" if name in known else "–" for name in COSTS]
