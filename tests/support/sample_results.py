"""A results.json as a run would write it, made up: for tests of what is made from it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diki_ray.answering.metrics import Metrics
from diki_ray.config import Config
from diki_ray.data.index import DatasetIndex
from diki_ray.data.shards import Sample, write_split

HOSTILE = "</td><script>alert('x')</script>\" onmouseover=\"x"
"""A class name that would run, if it were not escaped."""


def sample_results(names: Sequence[str], run: str = "made-up", seed: int = 0, epochs: int = 5) -> dict[str, Any]:
    """Accuracies rise when a task is learnt and fall a little afterwards; every class set has a hostile name in it."""
    random = np.random.default_rng(seed)
    num = len(names)
    zero, gain = random.uniform(0.1, 0.6, num), random.uniform(0.1, 0.4, num)
    accuracy = np.array(
        [[zero[j] + (gain[j] - 0.05 * (i - j) / num if i >= j else 0) for j in range(num)] for i in range(num)]
    )
    config = Config.model_validate(
        {"run": {"name": run, "storage": "somewhere"}, "tasks": [{"data": f"embedded:{n}", "name": n} for n in names]}
    )
    metrics = Metrics.of(accuracy.round(6))
    return {
        "format": 1,
        "run": run,
        "protocol": "own/image",
        "config_digest": config.digest(),
        "config": config.model_dump(mode="json"),
        "backbone": {"name": "embedded", "digest": "b" * 64, "embed_dim": 32},
        "command": "python jobs/continual.py --config <&>.yaml",
        "finished_at": "2026-01-01T00:00:00+0000",
        "versions": {"diki-ray": "0.1.0", "torch": "2.14", "python": "3.11"},
        "seconds": {"cluster": 5.0, "evaluate": 61.0, "plan": 1.0, "train": 7200.0},
        "trained": [names[-1]],
        "notes": {"text_feature_error": 7e-7, "text_grid": 33},
        "tasks": [_task(random, names, j, epochs) for j in range(num)],
        "zero_shot": zero.round(6).tolist(),
        "accuracy": accuracy.round(6).tolist(),
        "metrics": {
            name: {"mean": _number(metrics.mean(name)), "per_task": [_number(v) for v in values]}
            for name, values in vars(metrics).items()
        },
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


def _task(random: np.random.Generator, names: Sequence[str], j: int, epochs: int) -> dict[str, Any]:
    routed = random.multinomial(200, [0.9 if k == j else 0.1 / len(names) for k in range(len(names))] + [0.0])
    routed[j] += 200 - routed.sum()
    fall = np.exp(-np.arange(epochs) / 2)
    return {
        "name": names[j],
        "class_names": ["plain", "two words", HOSTILE],
        "templates": ["a photo of a {}."],
        "chance": 1 / 3,
        "data": {"uri": f"/nowhere/{names[j]}", "digest": str(j) * 64, "protocol": "embedded"},
        "module": {"key": "a" * 64, "digest": f"{j:064d}", "num_parameters": 3584},
        "num_train": 40,
        "num_test": 200,
        "num_skipped_train": j,
        "skipped_test": {"truncated image": 2} if j else {},
        "best_epoch": epochs - 1,
        "history": [
            {"loss": float(0.1 + 2 * f), "accuracy": float(0.9 - 0.6 * f), "validation_accuracy": float(0.8 - 0.6 * f)}
            for f in fall
        ],
        "routed": {"tasks": routed[:-1].tolist(), "frozen": int(routed[-1])},
        "weights": {
            "learnt": _histogram(random.beta(16, 4, 200)),
            "unlearnt": _histogram(random.beta(1, 8, 200)) if j else None,
        },
        "examples": [
            {
                "sample": n,
                "key": f"test/{n:06d}",
                "label": "plain",
                "answer": "plain" if n >= 4 else HOSTILE,
                "zero_shot_answer": "two words",
                "right": n >= 4,
                "confidence": 0.5,
                "routed": names[j] if n else None,
                "weight": 0.8,
            }
            for n in range(8)
        ],
    }


def _histogram(weights: np.ndarray) -> dict[str, Any]:
    return {"mean": round(float(weights.mean()), 6), "counts": np.histogram(weights, 20, (0, 1))[0].tolist()}


def with_test_shards(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The task with its test images in a real prepared data set: picture n is n · 30 grey, in two shards."""
    samples = [Sample(f"test/{n:06d}", _png(n), "png", n % 3) for n in range(8)]
    split = write_split(str(folder), "test", samples, num_classes=3, max_shard_bytes=8192)
    index = DatasetIndex(
        uri=str(folder),
        name=task["name"],
        class_names=tuple(task["class_names"]),
        templates=tuple(task["templates"]),
        split_protocol="embedded",
        splits={"test": split},
    )
    index.save()
    assert len(split.shards) > 1
    # Another template in the index than in the task: a user may give one of his own.
    replace(index, templates=("{}.",)).save()
    return task | {"data": {"uri": str(folder), "digest": index.digest(), "protocol": "embedded"}}


def _png(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (number * 30,) * 3).save(out, "PNG")
    return out.getvalue()
