"""A small stream for every method: what each adds to a step, or sums over images, is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from learning import tiny_plan

from diki_ray.runs.plan import Plan

TASKS = [{"data": f"embedded:{name}", "shots": 2} for name in ("digits", "gems")]
"""20 images each, in batches of 7: the last has 6."""
BLOCK = {"image_depth": 1, "text_depth": 1}
METHODS: dict[str, dict[str, Any]] = {
    "classes": {},  # sums alone
    "rail": {"hidden_dim": 16},
    "diki": BLOCK | {"image_length": 2, "text_length": 2},
    "concat_prompts": BLOCK | {"image_length": 2, "text_length": 2},
    "dpw": BLOCK | {"image_length": 2, "text_length": 2, "rank": 2},  # sums over what was trained
    "c_ada": BLOCK | {"rank": 2, "scale": 1.0},  # a penalty, the same everywhere
    "sequential_lora": BLOCK | {"against_forgetting": "ewc"},  # sums, and a penalty from the second task on
    "badam": BLOCK | {"name": "sequential_lora", "against_forgetting": "badam"},  # draws
    "blip": BLOCK | {"name": "sequential_lora", "against_forgetting": "blip", "blip_prior": 1e-12},  # draws in sums
    "zscl": BLOCK | {"num_reference": 15, "reference_batch": 5, "average_every": 2},  # a loss of shared rows
    "replay": BLOCK | {"name": "sequential_lora", "replay": {"num_images": 15, "batch_size": 4}},  # and of texts
    "zscl_replay": BLOCK | {"name": "zscl", "num_reference": 15, "reference_batch": 5, "replay": {"score": "random"}},
    "keep_lora": BLOCK | {"rank": 2},  # sums before the first step and after the last
    "snd": BLOCK | {"num_reference": 15, "reference_batch": 5},  # a loss of each part's own rows
    "mulki": BLOCK,  # a loss of each image, and sums before the first step
    "mahalanobis": {"rank": 2},  # logits of its own, with gradients that come by no features
}
MANY_PARTS = {"dpw": 12, "zscl": 7, "snd": 7, "mulki": 12, "replay": 11}
"""More than classes, images of a batch or reference rows: some parts have none of them."""


def plan_in(folder: Path, name: str) -> Plan:
    """zscl and snd distil on a third prepared set."""
    settings = METHODS[name]
    if "num_reference" in settings:
        mist = tiny_plan(folder, method={"name": "zero_shot"}, tasks=[{"data": "embedded:mist", "shots": 2}])
        settings = settings | {"reference": mist.tasks[0].index.uri}
    train = {"epochs": 1, "batch_size": 7, "num_parts": MANY_PARTS.get(name, 3), "lr": 0.05}
    return tiny_plan(folder, method={"name": name} | settings, tasks=TASKS, train=train)
