"""Reads a file of the golden layout (`DIKI_GOLDEN`, the copy in tests/golden by default) into the project's classes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors import safe_open
from torch import Tensor

from diki_ray.clip.backbone import Backbone
from diki_ray.learning.methods import Diki
from diki_ray.learning.module import TaskModule
from diki_ray.learning.moments import Moments
from diki_ray.learning.task_trainer import Recipe, TaskTrainer

PATH = Path(os.environ.get("DIKI_GOLDEN") or Path(__file__).parent.parent / "golden" / "diki_tiny.safetensors")


@dataclass(frozen=True)
class Golden:
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @staticmethod
    def load(path: Path = PATH) -> Golden:
        with safe_open(path, "pt") as file:
            return Golden(json.loads(file.metadata()["golden"]), {k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118

    @property
    def num_tasks(self) -> int:
        return len(self.meta["tasks"])

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return tensor.float() if tensor.is_floating_point() else tensor.long()

    @cached_property
    def backbone(self) -> Backbone:
        m = self.meta
        model = open_clip.model.CLIP(
            embed_dim=m["embed_dim"],
            vision_cfg={
                "image_size": m["image_size"],
                "patch_size": m["patch_size"],
                "width": m["vision_width"],
                "layers": m["layers"],
                "head_width": m["vision_width"] // m["heads_vision"],
            },
            text_cfg={
                "context_length": m["context_length"],
                "vocab_size": m["vocab_size"],
                "width": m["text_width"],
                "heads": m["heads_text"],
                "layers": m["layers"],
            },
            quick_gelu=m["quick_gelu"],
        )
        state = {
            k.removeprefix("backbone."): self[k]
            for k in self.tensors
            if k.startswith("backbone.") and "token_embedding" not in k
        }
        embedding = torch.zeros(m["vocab_size"], m["text_width"])
        embedding[self["backbone.token_embedding.rows"]] = self["backbone.token_embedding.values"]
        model.load_state_dict(state | {"token_embedding.weight": embedding})
        return Backbone(
            model, lambda image: image, open_clip.SimpleTokenizer(context_length=m["context_length"]), "golden"
        )

    @cached_property
    def method(self) -> Diki:
        m = self.meta
        return Diki(
            self.backbone,
            image_depth=m["prompt_depth_vision"],
            image_length=m["prompt_length_vision"],
            text_depth=m["prompt_depth_text"],
            text_length=m["prompt_length_text"],
        )

    def prompts(self, which: str, task: int) -> dict[str, Tensor]:
        """which: `init` or `trained`; named as the project names them."""
        prefix = f"{which}.task{task}."
        return {
            k.removeprefix(prefix).replace("vision.", "image."): self[k] for k in self.tensors if k.startswith(prefix)
        }

    def train_batches(self, task: int) -> list[tuple[Tensor, Tensor]]:
        size = self.meta["batch_size"]
        images, labels = self[f"task{task}.train.images"], self[f"task{task}.train.labels"]
        return list(zip(images.split(size), labels.split(size), strict=True))

    def module(self, task: int) -> TaskModule:
        """The task as the store would hold it, with the golden trained prompts and our own statistics."""
        template, names = self.meta["tasks"][task]
        features = self.backbone.encode_image(self[f"task{task}.train.images"])
        return TaskModule(
            key=str(task),
            task=str(task),
            class_names=tuple(names),
            templates=(template,),
            method="diki",
            parameters={k: v.numpy() for k, v in self.prompts("trained", task).items()},
            moments=Moments.of(features),
            validation_features=features[:64].numpy().astype(np.float16),
        )


def golden_trainer(golden: Golden, recipe: Recipe | None = None, num_parts: int | None = None) -> TaskTrainer:
    meta = golden.meta
    recipe = recipe or Recipe(lr=meta["lr"], final_lr_fraction=meta["lr_final"] / meta["lr"])
    steps = meta["epochs"] * len(golden.train_batches(0))
    return TaskTrainer(
        golden.method, golden["task0.tokens"], recipe, steps, golden.prompts("init", 0), num_parts=num_parts
    )
