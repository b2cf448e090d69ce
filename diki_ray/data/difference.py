"""What a data set has more, and less, than an earlier one: images compared by their bytes and their class's name."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diki_ray.data.index import DatasetIndex
from diki_ray.data.shards import decode_sample, read_encoded

Int64 = NDArray[np.int64]
Image = tuple[bytes, str]
"""SHA-256 of the file's bytes, name of the class."""


@dataclass(frozen=True, eq=False)
class Difference:
    """Places of images in the training splits of two prepared data sets, ascending, int64: `added` are in today's and
    were not in the former one, `removed` the other way round."""

    former: DatasetIndex
    added: Int64
    removed: Int64


def difference(former: DatasetIndex, today: DatasetIndex, split: str = "train") -> Difference:
    """Compares two data sets. Shards that both have are not read, of the others the bytes; no image is decoded.

    An image that one of them has twice counts twice.

    Raises:
        BadSampleError: a sample is damaged. StorageError: a shard is missing or cannot be read.
    """
    both = _shards(former, split) & _shards(today, split) if former.class_names == today.class_names else set()
    before: dict[Image, list[int]] = defaultdict(list)
    for place, image in _images(former, split, both):
        before[image].append(place)
    added = []
    for place, image in _images(today, split, both):
        if before.get(image):
            before[image].pop()
        else:
            added.append(place)
    removed = sorted(place for places in before.values() for place in places)
    return Difference(former, np.array(added, np.int64), np.array(removed, np.int64))


def _shards(index: DatasetIndex, split: str) -> set[str]:
    return {shard.sha256 for shard in index.split(split).shards}


def _images(index: DatasetIndex, split: str, without: set[str]) -> Iterator[tuple[int, Image]]:
    """Each image with its place in the split, shard by shard."""
    first = 0
    for shard in index.split(split).shards:
        where = index.shard_uri(shard)
        encoded = [] if shard.sha256 in without else read_encoded(where, shard, 0, shard.num_samples)
        for number, data in enumerate(encoded):
            sample = decode_sample(data, shard, number, where, len(index.class_names))
            yield first + number, (hashlib.sha256(sample.image).digest(), index.class_names[sample.label])
        first += shard.num_samples
