"""Reference data that belong to no task, for the methods that distil from them (`method.reference`).

Which they are is decided here; the method draws from them by its task's seed and the step's number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from PIL import Image
from torch import Tensor

from diki_ray.clip.backbone import Backbone
from diki_ray.config import Config
from diki_ray.data.index import DatasetIndex
from diki_ray.data.prepare import load_prepared
from diki_ray.data.stream import eval_batches
from diki_ray.data.world import tasks as world
from diki_ray.errors import ConfigError

PRETRAINING_SEED = 0
"""The pictures that the embedded CLIP was pre-trained on were drawn from this seed (jobs/pretrain.py)."""


def reference_digest(config: Config) -> str | None:
    """What module keys know of the reference data; None where the method has none.

    Raises:
        ConfigError: the method needs reference data and there are none.
    """
    if "reference" not in type(config.method).model_fields:
        return None
    index = _prepared(config)
    return f"embedded/{world.WORLD_VERSION}" if index is None else index.digest("train")


def reference_of(config: Config, backbone: Backbone) -> tuple[Tensor, Sequence[str]]:
    """Images [N, 3, H, W], the first `method.num_reference`, and captions: one for each of the embedded world's
    pictures, one for each class of a prepared data set."""
    index, num_images = _prepared(config), config.method.num_reference  # type: ignore[union-attr]
    if index is None:
        return _pretraining_pictures(backbone, num_images)
    batches = eval_batches(
        index,
        "train",
        batch_size=num_images,
        transform=backbone.preprocess,
        batches=[0],
        num_threads=config.data.num_threads,
    )
    return next(batches).images, [index.templates[0].format(name.replace("_", " ")) for name in index.class_names]


def _prepared(config: Config) -> DatasetIndex | None:
    """The prepared data set; None: the embedded CLIP's pre-training pictures."""
    place: str | None = config.method.reference  # type: ignore[union-attr]
    if place is None:
        if config.backbone.name == "embedded":
            return None
        raise ConfigError(
            f"method.reference: {config.method.name} distils on data of no task, and only the embedded backbone brings "
            "some; set it to the folder of a prepared data set (`diki-ray prepare` makes one)."
        )
    index = load_prepared(place)
    if index is None:
        raise ConfigError(f"method.reference: {place} is no prepared data set; make one of it with `diki-ray prepare`.")
    return index


def _pretraining_pictures(backbone: Backbone, num_images: int) -> tuple[Tensor, list[str]]:
    pairs = _drawn(num_images)
    return torch.stack([backbone.preprocess(picture) for picture, _ in pairs]), [caption for _, caption in pairs]


@cache  # drawing takes milliseconds a picture, and a sweep's trial trains many streams in one process
def _drawn(num_images: int) -> list[tuple[Image.Image, str]]:
    return list(world.pretraining_pairs(PRETRAINING_SEED, num_images))
