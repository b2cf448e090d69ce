"""Runs as a job leaves them in storage, made without training: random parameters, statistics of made-up pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sample_results import sample_results
from tiny_backbone import write_tiny_backbone

from diki_ray.clip.backbone import Backbone
from diki_ray.config import parse
from diki_ray.learning.methods import Method
from diki_ray.learning.module import TaskModule
from diki_ray.learning.statistics import Statistics
from diki_ray.runs.plan import build_method, load_backbone
from diki_ray.store.log import seal, unseal
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore

COLOURS = {"warm": (200, 90, 40), "cold": (40, 90, 200), "lush": (60, 190, 60), "grey": (120, 120, 120)}
CLASSES = {"warm": ("red", "[b]orange[/b]"), "cold": ("blue", "violet", "navy_blue"), "lush": ("moss", "fern")}
TEMPLATES = {"warm": ("a warm photo of {}.",), "cold": ("a photo of {}.", "{} and cold."), "lush": ("a {}.",)}
TOKEN = "a-token-of-these-tests-0123456789"


def picture(task: str, seed: int, size: int = 40) -> Image.Image:
    """Noise around the task's colour."""
    pixels = np.random.default_rng(seed).normal(COLOURS[task], 30, (size, size, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def file_of(image: Image.Image, image_format: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, image_format)
    return out.getvalue()


def picture_file(task: str, seed: int) -> bytes:
    return file_of(picture(task, seed))


def as_json(*files: bytes, **asked: Any) -> dict[str, Any]:
    return {"images": [base64.b64encode(data).decode() for data in files], **asked}


def made_up_module(
    method: Method, backbone: Backbone, images: torch.Tensor, seed: int, scale: Callable[[str], float] = lambda _: 1.0,
    **fields: Any,
) -> TaskModule:  # fmt: skip
    """A module with random parameters, each times `scale` of its name, and the statistics of these images."""
    generator = torch.Generator().manual_seed(seed)
    initial = method.initial(generator, None)
    features = backbone.encode_image(images)
    num_classes = len(fields["class_names"])
    statistics = Statistics.of(features, torch.arange(len(features)) % num_classes, num_classes)
    return TaskModule(
        method="diki",
        parameters={n: scale(n) * torch.randn(p.shape, generator=generator).numpy() for n, p in initial.items()},
        moments=statistics.moments,
        statistics=statistics,
        validation_features=features[:8].numpy().astype(np.float16),
        **fields,
    )


class StoredRun:
    """A stored run, `colours` if not told otherwise, that this process holds: tasks can be added to it."""

    def __init__(
        self,
        folder: Path,
        *tasks: str,
        name: str = "colours",
        classes: Mapping[str, tuple[str, ...]] = CLASSES,
        **sections: Any,
    ) -> None:
        """It has learnt `tasks`, of the stream that `classes` names; further `sections` are of the configuration."""
        self.config = parse(
            {
                "run": {"name": name, "storage": str(folder / "storage")},
                "tasks": [{"data": f"embedded:{task}"} for task in classes],
                "backbone": {"name": str(write_tiny_backbone(folder))},
                "method": {"image_depth": 2, "image_length": 2, "text_depth": 2, "text_length": 2},
                "statistics": {"shrinkage": "oas"},
                "routing": {"density": "task"},
            }
            | sections
        )
        self.classes = classes
        self.backbone = load_backbone(self.config)
        self.storage = self.config.run.storage
        self.store = RunStore.open(self.storage, name)
        self.epoch = self.store.acquire(this_process("test"))
        self.store.put_document(self.epoch, "config.yaml", self.config.to_yaml())
        self.store.put_document(self.epoch, "results.json", self._results(tasks or tuple(classes)[:1]))
        for task in tasks:
            self.learn(task)

    def _results(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Made up, but for the backbone; as short as results may be."""
        results = sample_results(tasks, self.config.run.name, epochs=1)
        results["config"] = self.config.model_dump(mode="json")
        results["backbone"] |= {"digest": self.backbone.digest(), "name": self.config.backbone.name}
        for task in results["tasks"]:
            task["examples"] = task["examples"][:1]
            for weights in filter(None, task["weights"].values()):
                weights["counts"] = weights["counts"][:2]
        return results

    def learn(self, task: str) -> int:
        """Commit a module for the task; the log's version afterwards."""
        number = list(self.classes).index(task)
        module = made_up_module(
            build_method(self.config, self.backbone),
            self.backbone,
            torch.stack([self.backbone.preprocess(picture(task, seed)) for seed in range(60)]),
            seed=number,
            key=str(number) * 64,
            task=task,
            class_names=self.classes[task],
            templates=TEMPLATES[task],
        )
        self.store.commit_module(self.epoch, module.key, task, module.to_bytes())
        return self.store.version


Change = Callable[[dict[str, Any], dict[str, np.ndarray]], Any]
"""Of a header and of the arrays beside it, in place."""


def fill(name: str, value: float) -> Change:
    def change(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        found = next(n for n in tensors if n.startswith(name))
        tensors[found].reshape(-1)[0] = value

    return change


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A sealed document changed, and sealed again."""
    content = unseal(path.read_bytes(), "theirs")
    path.write_bytes(seal(change(content) or content))
