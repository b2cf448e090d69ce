"""Measure the training stream against webdataset's usual pipeline and ray.data, on the same shards, in one run.

    python jobs/benchmark_stream.py prepared/EuroSAT --backbone mini_clip.py --threads 1 --rounds 5

Each reads the train split once a round and hands over batches of the same size, decoded and preprocessed alike; the
three take turns. The stream keeps no decoded image (its cache is off): every round reads, decodes and preprocesses.
`decode` is the same images decoded and preprocessed in one thread, with nothing else: what no reader can do without.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from diki_ray.clip import backbone as backbones
from diki_ray.data.images import decode_image
from diki_ray.data.index import DatasetIndex
from diki_ray.data.prepare import load_prepared
from diki_ray.data.shards import read_shard
from diki_ray.data.stream import TrainStream
from diki_ray.errors import UserError
from diki_ray.runs.cluster import LOCAL, connected

Transform = Callable[[Image.Image], torch.Tensor]
Reader = Callable[[int], Iterator[int]]  # an epoch's number to the sizes of its batches

IMAGE_EXTENSIONS = "png;jpg;jpeg"
SHUFFLE_BUFFER = 1000  # webdataset's usual
BATCH_SIZE = 32


def stream_reader(index: DatasetIndex, transform: Transform, batch_size: int, threads: int) -> Reader:
    stream = TrainStream(
        index, "train", seed=0, batch_size=batch_size, transform=transform, num_threads=threads, cache_bytes=0
    )
    return lambda epoch: (len(batch.images) for batch in stream.epoch(epoch))


def webdataset_reader(shards: list[str], transform: Transform, batch_size: int, workers: int) -> Reader:
    """Shards and samples shuffled, decoded by Pillow, batched, in `workers` processes (0: in this one)."""

    def to_image(data: bytes) -> torch.Tensor:
        return transform(Image.open(io.BytesIO(data)).convert("RGB"))

    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0, nodesplitter=webdataset.split_by_node)
        .shuffle(SHUFFLE_BUFFER)
        .to_tuple(IMAGE_EXTENSIONS, "cls")
        .map_tuple(to_image, int)
        .batched(batch_size)
    )
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    return lambda epoch: (len(images) for images, _ in loader)


def ray_data_reader(shards: list[str], transform: Transform, batch_size: int) -> Reader:
    """read_webdataset, decoded in its tasks, which have as many CPUs as the others have threads."""

    def to_batch(batch: dict[str, Any]) -> dict[str, Any]:
        kinds = [kind for kind in IMAGE_EXTENSIONS.split(";") if kind in batch]
        images = [
            next(batch[kind][i] for kind in kinds if batch[kind][i] is not None) for i in range(len(batch["cls"]))
        ]
        pixels = [transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in images]
        return {"image": torch.stack(pixels).numpy(), "label": [int(label) for label in batch["cls"]]}

    def epoch(number: int) -> Iterator[int]:
        dataset = ray.data.read_webdataset(shards, decoder=None, shuffle="files")
        for batch in dataset.map_batches(to_batch, batch_size=batch_size).iter_torch_batches(batch_size=batch_size):
            yield len(batch["image"])

    return epoch


def decode_reader(shards: list[str], transform: Transform) -> Reader:
    encoded = [sample.image for shard in shards for sample in read_shard(shard)]
    return lambda epoch: (len(transform(decode_image(data))[None]) for data in encoded)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a prepared data set on a local disk")
    parser.add_argument("--backbone", default="embedded", help="whose preprocessing: as backbone.name")
    parser.add_argument("--threads", type=int, default=1, help="that decode, in each of the three")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    try:
        index = load_prepared(arguments.source)
        if index is None:
            raise UserError(f"{arguments.source} is not a prepared data set; see `diki-ray prepare`")
        transform = backbones.load(arguments.backbone).preprocess
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    split, batch = index.split("train"), BATCH_SIZE
    shards = [os.path.abspath(index.shard_uri(shard)) for shard in split.shards]
    readers = {
        "TrainStream": stream_reader(index, transform, batch, arguments.threads),
        "webdataset": webdataset_reader(shards, transform, batch, arguments.threads if arguments.threads > 1 else 0),
        "ray.data": ray_data_reader(shards, transform, batch),
        "decode": decode_reader(shards, transform),
    }
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    with connected(LOCAL, num_cpus=arguments.threads):
        for number in range(arguments.rounds + 1):  # the first is a warm-up
            for name, reader in readers.items():
                started = time.perf_counter()
                read = sum(reader(number))
                if read != split.num_samples:
                    raise AssertionError(f"{name} read {read} of {split.num_samples} images")
                if number:
                    seconds[name].append(time.perf_counter() - started)
    report(split.num_samples, split.num_bytes, seconds)
    return 0


def report(num_samples: int, num_bytes: int, seconds: dict[str, list[float]]) -> None:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    table = Table("", "images/s", "fastest, slowest round", "MB/s of shards", "decoding, share of the time")
    for name, values in seconds.items():
        rates = f"{num_samples / min(values):.0f}, {num_samples / max(values):.0f}"
        share = f"{median['decode'] / median[name]:.2f}"
        table.add_row(name, f"{num_samples / median[name]:.0f}", rates, f"{num_bytes / median[name] / 1e6:.1f}", share)
    Console(width=120).print(table)
    print(json.dumps({"images": num_samples, "bytes": num_bytes, "seconds": seconds}))


if __name__ == "__main__":
    sys.exit(main())
