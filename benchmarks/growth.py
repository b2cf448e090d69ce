"""A task added to an evaluated stream, against evaluating the whole stream, from prepared data."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image

from benchmarks.evaluation import Row
from benchmarks.timing import timed
from benchmarks.world import TEMPLATE, World
from diki_ray.config import parse
from diki_ray.data import stream
from diki_ray.data.stream import eval_batches
from diki_ray.runs.evaluate.split import evaluate_here
from diki_ray.runs.plan import Plan, load_backbone, make_plan
from diki_ray.store.caches import Cache

BACKBONE = """\
from benchmarks.world import World


def create(directory):
    backbone = World.make({model!r}, "cpu").backbone
    return backbone.model, backbone.preprocess, backbone.tokenizer
"""


def growth(world: World, density: str, num_tasks: int, num_classes: int, num_images: int, rounds: int) -> Row:
    """Seconds in one process, from reading images to every accuracy of the stream, with `num_images` test images of a
    task. The router of this density tells the tasks apart by colour and noise."""
    with tempfile.TemporaryDirectory() as folder:
        plan = _plan(world, Path(folder), density, num_tasks, num_classes, num_images)
        blobs = _modules(world, plan)

        def evaluate(stream_of: Plan, cache: Cache) -> None:
            digests, order = list(blobs)[: len(stream_of.tasks)], range(len(stream_of.tasks))
            evaluate_here(stream_of, digests, blobs.__getitem__, [order], "test", cache).accuracy()

        before, whole, grown, decoded = replace(plan, tasks=plan.tasks[:-1]), [], [], 0
        for n in range(rounds + 1):
            afresh, kept = (Cache.open(f"{folder}/{name}-{n}") for name in ("afresh", "kept"))
            evaluate(before, kept)
            whole.append(timed(world.device, partial(evaluate, plan, afresh)))
            with patch.object(stream, "decode_image", wraps=stream.decode_image) as decoding:
                grown.append(timed(world.device, partial(evaluate, plan, kept)))
            decoded = decoding.call_count
        all_s, more_s = statistics.median(whole[1:]), statistics.median(grown[1:])
    return {
        "density": density,
        "tasks": num_tasks,
        "classes": num_classes,
        "images_per_task": num_images,
        "all_tasks_s": all_s,
        "one_more_task_s": more_s,
        "share": more_s / all_s,
        "images": num_tasks * num_images,
        "images_decoded_for_one_more": decoded,
    }


def _plan(world: World, folder: Path, density: str, num_tasks: int, num_classes: int, num_images: int) -> Plan:
    (folder / "backbone.py").write_text(BACKBONE.format(model=world.model))
    for task in range(num_tasks):
        _write_images(folder / f"task{task}", task, num_classes, num_images)
    method = {f"{tower}_depth": depth for tower, depth in world.method.depth.items()}
    config = parse(
        {
            "run": {"name": "growth", "storage": str(folder / "storage")},
            "tasks": [{"data": str(folder / f"task{t}"), "template": TEMPLATE} for t in range(num_tasks)],
            "backbone": {"name": str(folder / "backbone.py")},
            "method": method | {"image_length": 8, "text_length": 8},
            "statistics": {"shrinkage": "oas"},
            "routing": {"density": density},
            "train": {"device": world.device},
            "data": {"root": str(folder / "prepared")},
        }
    )
    return make_plan(config, load_backbone(config))


def _write_images(folder: Path, task: int, num_classes: int, num_images: int) -> None:
    random = np.random.default_rng(task)
    colour = random.uniform(40, 215, size=(6, 6, 3))
    for split, count in (("train", 96), ("test", num_images)):
        for n in range(count):
            place = folder / split / f"thing {n % num_classes} of {task}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(colour + random.normal(0, 40, size=colour.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((224, 224), Image.Resampling.NEAREST).save(place / f"{n}.png")


def _modules(world: World, plan: Plan) -> dict[str, bytes]:
    """Random prompts with the statistics of the training images, by names that stand for digests."""
    modules: dict[str, bytes] = {}
    for n, task in enumerate(plan.tasks):
        read = eval_batches(task.index, "train", batch_size=96, transform=world.backbone.preprocess)
        batch = next(read)
        module = world.module(n, list(task.class_names), batch.images.to(world.device), batch.labels)
        modules[f"module-{n}"] = module.to_bytes()
    return modules
