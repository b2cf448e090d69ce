"""This runs in those processes of a batch prediction that read images for others to answer. They start without torch,
which takes longer to import than thousands of images to be read.

Where the backbone's preprocessing is CLIP's, those that read also decode and scale, so that what answers has the rest
alone to do, for all images of a pass at once: beside it threads that decode would cost it a fifth of its speed, as they
take turns in one interpreter. Else images travel undecoded and are decoded by the worker that answers them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

import pyarrow as pa
from PIL import Image

from diki_ray.data.images import UndecodableImageError, at_size, decode_image
from diki_ray.data.inputs import from_json

ROWS_PER_BLOCK = 64
MAX_ASPECT_RATIO = 30.0
"""It is that of serving. CLIP scales the shorter side to the model's size: a line of a million pixels, tiny as a file,
would become an image of hundreds of millions and take its worker along."""
READ = pa.schema({"image": pa.string(), "data": pa.large_binary(), "error": pa.string()})


def read_parts(rows: dict[str, Any], size_px: int | None) -> Iterator[pa.Table]:
    """Yields the inputs of parts in JSON, a few at a time: image files, or with `size_px` their RGB pixels in a square
    of this size."""
    for part in rows["part"]:
        inputs = from_json(part).read()
        while some := [_read(asdict(row), size_px) for row in islice(inputs, ROWS_PER_BLOCK)]:
            yield pa.Table.from_pylist(some, READ)


def _read(row: dict[str, Any], size_px: int | None) -> dict[str, Any]:
    if size_px is None or row["data"] is None:
        return row
    try:
        return row | {"data": at_size(decoded(row["data"]), size_px).tobytes()}
    except UndecodableImageError as refused:
        return row | {"data": None, "error": refused.reason}


def decoded(data: bytes) -> Image.Image:
    """Decodes an image file. Raises UndecodableImageError, also for a line of pixels."""
    image = decode_image(data)
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise UndecodableImageError("too long and thin")
    return image
