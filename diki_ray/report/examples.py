"""Pictures of the report's examples: read from the test shards by sample number, as small data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from diki_ray.data.images import UndecodableImageError, decode_image
from diki_ray.data.index import DatasetIndex
from diki_ray.data.shards import BadSampleError, decode_sample, read_encoded
from diki_ray.errors import DataError, StorageError

THUMBNAIL_PX = 128
"""The longer side, twice what is shown: sharp on dense screens, and about 4 kB a picture."""


@dataclass(frozen=True)
class Pictures:
    """Data URIs of the examples of one task by sample key; `problem` is a sentence where some could not be had."""

    by_key: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None


def read_pictures(task: Mapping[str, Any]) -> Pictures:
    """The pictures of the examples of one task of results.json. Never raises for data that are away: says so."""
    uri = task["data"]["uri"]
    try:
        # The digest is over the templates too, and a task may have been given another one than its data set's.
        index = replace(DatasetIndex.load(uri), templates=tuple(task["templates"]))
        if index.digest() != task["data"]["digest"]:
            return Pictures(problem=f"the data set in {uri} is not the one this run was evaluated on any more")
        num_skipped = sum(task["skipped_test"].values())
        found = {e["key"]: _find(index, e["sample"], num_skipped, e["key"]) for e in task["examples"]}
    except (DataError, StorageError) as error:
        return Pictures(problem=f"the test images could not be read: {error}")
    missing = [key for key, picture in found.items() if picture is None]
    problem = f"{len(missing)} of {len(found)} test images could not be read" if missing else None
    return Pictures({key: picture for key, picture in found.items() if picture is not None}, problem)


def _find(index: DatasetIndex, row: int, num_skipped: int, key: str) -> str | None:
    """The picture of an example, which is row `row` of those that could be read: skipped ones come before it."""
    for number in range(row, row + num_skipped + 1):
        sample = _sample(index, number)
        if sample is not None and sample[0] == key:
            return _thumbnail(sample[1])
    return None


def _sample(index: DatasetIndex, number: int) -> tuple[str, Image.Image] | None:
    """(key, image) of a test sample, counted in index order; None when it is damaged or there is none."""
    for shard in index.split("test").shards:
        if number < shard.num_samples:
            uri = index.shard_uri(shard)
            try:
                encoded = read_encoded(uri, shard, number, number + 1)[0]
                sample = decode_sample(encoded, shard, number, uri, len(index.class_names))
                return sample.key, decode_image(sample.image)
            except (BadSampleError, UndecodableImageError):
                return None
        number -= shard.num_samples
    return None


def _thumbnail(image: Image.Image) -> str:
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
