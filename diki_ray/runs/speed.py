"""How fast a method is on this machine, measured in a moment on made-up images: what a forecast multiplies."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

from diki_ray.config import Config
from diki_ray.data.images import decode_image
from diki_ray.data.index import DatasetIndex
from diki_ray.data.prepare import Preparation
from diki_ray.data.shards import SkipLedger
from diki_ray.data.stream import eval_batches
from diki_ray.errors import DataError
from diki_ray.learning.methods import Method, Zscl
from diki_ray.learning.task_trainer import TaskTrainer
from diki_ray.runs.plan import device_of, precision_of, recipe_of

STEP_S = 1.0
"""A measured step takes about so long: its number of images follows from that of a frozen pass."""
MOST, LEAST = 32, 2
_STEP_IN_PASSES = 3
"""A forward and a backward pass take about as long as three forward ones."""
NUM_DECODED = 16
_NAMES = [f"class {number}" for number in range(MOST)]


@dataclass(frozen=True)
class Speed:
    """Seconds that one worker needs."""

    frozen_image_s: float
    """For a forward pass of the image tower, an image."""
    step_image_s: float
    """For an image of a training step; 0 where nothing is trained."""
    step_class_s: float
    """For a class of a training step, whose caption goes through the text tower in every step."""


def measured(config: Config, method: Method) -> Speed | None:
    """The speed of one worker on this machine's device; None where it can't be told from here: the GPU that is
    configured is not in this machine, or every step reads reference images."""
    device = device_of(config)
    if (device == "cuda" and not torch.cuda.is_available()) or isinstance(method, Zscl):
        return None
    backbone = method.backbone.to(device, precision_of(config))
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(config.train.cpus_per_worker)))
    try:
        shape = backbone.preprocess(Image.new("RGB", (64, 64))).shape
        images = torch.zeros(MOST, *shape)
        with torch.no_grad():
            frozen = _seconds(lambda: backbone.encode_image(images[:LEAST]), device) / LEAST
        number = max(LEAST, min(MOST, int(STEP_S / (_STEP_IN_PASSES * frozen))))
        with torch.no_grad():
            frozen = _seconds(lambda: backbone.encode_image(images[:number]), device) / number
        return Speed(frozen, *_of_a_step(config, method, images[:number]))
    finally:
        torch.set_num_threads(threads)


def _of_a_step(config: Config, method: Method, images: torch.Tensor) -> tuple[float, float]:
    """Seconds for an image and for a class: those of a step are taken to be linear in both."""
    many, few = len(images), max(1, len(images) // 4)

    def step(num_images: int, num_classes: int) -> float | None:
        tokens = method.backbone.tokenize(_NAMES[:num_classes], "a photo of a {}.")
        parameters = method.initial(torch.Generator().manual_seed(0))
        trainer = TaskTrainer(method, tokens, recipe_of(config), 8, parameters, num_parts=1)
        if not trainer.parameters:
            return None
        labels = torch.zeros(num_images, dtype=torch.long)
        return _seconds(lambda: trainer.step(images[:num_images], labels), device_of(config))

    by_images, by_classes = step(many, few), step(few, many)
    if by_images is None or by_classes is None:
        return 0.0, 0.0
    square = many**2 - few**2
    return (
        max(0.0, (many * by_images - few * by_classes) / square),
        max(0.0, (many * by_classes - few * by_images) / square),
    )


def _seconds(work: Callable[[], object], device: str) -> float:
    """The better of two calls, after one that fills caches."""
    taken = []
    for _ in range(3):
        started = time.monotonic()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.monotonic() - started)
    return min(taken[1:])


def decoding_s(data: DatasetIndex | Preparation, method: Method) -> float:
    """Seconds that one thread needs to read and decode an image of a data set: of its first ones."""
    preprocess = method.backbone.preprocess
    if isinstance(data, DatasetIndex):
        started = time.monotonic()
        batches = eval_batches(
            data,
            "train",
            batch_size=NUM_DECODED,
            transform=preprocess,
            batches=[0],
            num_threads=1,
            ledger=SkipLedger(),
        )
        number = sum(len(batch.labels) for batch in batches)
        return (time.monotonic() - started) / max(1, number)
    refs, reader = [item.ref for item in data.choice.splits["train"][:NUM_DECODED]], data.raw.reader
    taken = []
    for ref in (refs[0], *refs):  # the first one twice: a file is opened, or a split drawn, once for all images
        started = time.monotonic()
        with contextlib.suppress(OSError, DataError):  # a damaged image: the run counts it
            preprocess(decode_image(reader.read(ref)[0]))
        taken.append(time.monotonic() - started)
    return sum(taken[1:]) / len(refs)
