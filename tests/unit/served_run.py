"""A run of colours for the tests of serving, written as a job writes it, without training: tasks can be added to it."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_backbone import write_tiny_backbone

from diki_ray.config import parse
from diki_ray.learning.module import TaskModule
from diki_ray.learning.moments import Moments
from diki_ray.runs.plan import build_method, load_backbone
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore

COLOURS = {"warm": (200, 90, 40), "cold": (40, 90, 200), "lush": (60, 190, 60)}
CLASSES = {"warm": ("red", "[b]orange[/b]"), "cold": ("blue", "violet", "navy_blue"), "lush": ("moss", "fern")}
TEMPLATES = {"warm": ("a warm photo of {}.",), "cold": ("a photo of {}.", "{} and cold."), "lush": ("a {}.",)}
TOKEN = "a-token-of-these-tests-0123456789"


def picture(task: str, seed: int, size: int = 40) -> Image.Image:
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


class ServedRun:
    """A stored run called `colours`, held by this process."""

    def __init__(self, folder: Path, *tasks: str) -> None:
        self.config = parse(
            {
                "run": {"name": "colours", "storage": str(folder / "storage")},
                "tasks": [{"data": f"embedded:{name}"} for name in COLOURS],
                "backbone": {"name": str(write_tiny_backbone(folder))},
                "method": {"image_depth": 2, "image_length": 2, "text_depth": 2, "text_length": 2},
                "statistics": {"shrinkage": "oas"},
            }
        )
        self.backbone = load_backbone(self.config)
        self.storage = self.config.run.storage
        self.store = RunStore.open(self.storage, "colours")
        self.epoch = self.store.acquire(this_process("test"))
        self.store.put_document(self.epoch, "config.yaml", self.config.to_yaml())
        results = {"backbone": {"digest": self.backbone.digest(), "name": self.config.backbone.name}}
        self.store.put_document(self.epoch, "results.json", results)
        for task in tasks:
            self.learn(task)

    def learn(self, task: str) -> int:
        """Commit a module for the task; the log's version afterwards."""
        number = list(COLOURS).index(task)
        generator = torch.Generator().manual_seed(number)
        initial = build_method(self.config, self.backbone).initial(generator, None)
        images = torch.stack([self.backbone.preprocess(picture(task, seed)) for seed in range(60)])
        module = TaskModule(
            key=str(number) * 64,
            task=task,
            class_names=CLASSES[task],
            templates=TEMPLATES[task],
            method="diki",
            parameters={name: torch.randn(p.shape, generator=generator).numpy() for name, p in initial.items()},
            moments=Moments.of(self.backbone.encode_image(images)),
            validation_features=np.zeros((0, self.backbone.embed_dim), np.float16),
        )
        self.store.commit_module(self.epoch, module.key, task, module.to_bytes())
        return self.store.version
