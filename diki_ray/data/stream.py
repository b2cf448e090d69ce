"""Training and evaluation batches of a prepared data set, read in the canonical order (diki_ray.data.order).

Reading, decoding and waiting overlap: range requests fetch a window of samples ahead of need, threads decode (Pillow
lets go of the interpreter while it does), and a few batches are kept under way. Memory is bounded: two windows a
stream undecoded (2·K·V/W image files; K = 32 and V = 24: 1,536 for W = 1), `prefetch_batches` + 1 batches, and the
cache of decoded images, which has a budget.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diki_ray.data.images import UndecodableImageError, decode_image
from diki_ray.data.index import DatasetIndex
from diki_ray.data.order import (
    DEFAULT_NUM_STREAMS,
    DEFAULT_WINDOW,
    EpochOrder,
    Int64,
    PlannedBatch,
    plan_epoch,
    streams_of,
)
from diki_ray.data.shards import BadSampleError, SkipLedger, decode_sample, read_encoded
from diki_ray.errors import DataError

Transform = Callable[[Image.Image], Tensor]

DEFAULT_CACHE_BYTES = 512 * 2**20

_MAX_GROUP = 16
"""Samples that a thread decodes at one go. One at a time, handing them over cost a fifth of decoding small images."""

_READ_THREADS = 8
"""Range requests in flight. They wait for disks and networks and take no processor time."""


@dataclass(frozen=True)
class Batch:
    """A part of a global batch.

    `images` float [b, 3, H, W], `labels` int64 [b]; b may be 0. Samples that could not be decoded are missing, the
    others keep their positions. `step` is the number of the global batch in its epoch; `global_size` the number of
    samples it was planned with over all ranks, skipped ones included: divide losses by it.
    """

    epoch: int
    step: int
    images: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    positions: tuple[int, ...]
    global_size: int


@dataclass(frozen=True)
class _Decoded:
    image: Tensor
    label: int
    key: str


@dataclass(frozen=True)
class _UnderWay:
    """A batch being made: threads fill `images` place by place; `found` has key and label of what is there."""

    plan: PlannedBatch
    images: Tensor
    found: list[tuple[str, int] | None]
    groups: list[Future[None]]


class _SplitReader:
    """Turns planned batches into batches: reads, decodes in threads, and remembers what fits `cache_bytes`."""

    def __init__(
        self,
        index: DatasetIndex,
        split: str,
        transform: Transform,
        num_threads: int,
        prefetch_batches: int,
        ledger: SkipLedger | None,
        cache_bytes: int,
    ) -> None:
        self.index = index
        self.split = index.split(split)
        self.num_threads = num_threads
        self.prefetch_batches = prefetch_batches
        self.ledger = SkipLedger(budget=default_skip_budget(self.split.num_samples)) if ledger is None else ledger
        self.sizes = tuple(shard.num_samples for shard in self.split.shards)
        self._ends = list(accumulate(self.sizes))
        self._transform = transform
        self._blank = transform(Image.new("RGB", (64, 64)))  # the shape of what no image came for: empty batches
        sample_bytes = max(1, self._blank.nbytes)
        self._cache_room = cache_bytes // sample_bytes
        self._cache: dict[int, _Decoded] = {}

    def batches(
        self, epoch: int, planned: Iterable[PlannedBatch], samples_of_read: Callable[[int, int], Int64]
    ) -> Iterator[Batch]:
        """The batches, in order; what later ones need is read and decoded meanwhile."""
        with (
            ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read") as reading,
            ThreadPoolExecutor(self.num_threads, thread_name_prefix="decode") as decoding,
        ):
            reads: dict[int, dict[int, Future[dict[int, bytes]]]] = {}

            def read(lane: int, number: int) -> Future[dict[int, bytes]]:
                lane_reads = reads.setdefault(lane, {})
                for old in [n for n in lane_reads if n < number]:
                    del lane_reads[old]
                for wanted in (number, number + 1):
                    if wanted not in lane_reads and (samples := samples_of_read(lane, wanted)).size:
                        lane_reads[wanted] = reading.submit(self._read, samples)
                return lane_reads[number]

            def start(plan: PlannedBatch) -> _UnderWay:
                samples = plan.samples.tolist()
                images = self._blank.new_empty((len(samples), *self._blank.shape))
                batch = _UnderWay(plan, images, [None] * len(samples), [])
                size = max(1, min(_MAX_GROUP, len(samples) // (4 * self.num_threads)))
                for first in range(0, len(samples), size):
                    places = range(first, min(first + size, len(samples)))
                    reads_of = {p: read(*plan.reads[p]) for p in places if samples[p] not in self._cache}
                    batch.groups.append(decoding.submit(self._fill, batch, places, reads_of))
                return batch

            under_way: deque[_UnderWay] = deque()
            try:
                for plan in planned:
                    under_way.append(start(plan))
                    if len(under_way) > self.prefetch_batches:
                        yield self._assemble(epoch, under_way.popleft())
                while under_way:
                    yield self._assemble(epoch, under_way.popleft())
            finally:  # an error or a consumer that stops: don't decode what nobody waits for
                decoding.shutdown(wait=False, cancel_futures=True)
                reading.shutdown(wait=False, cancel_futures=True)

    def _locate(self, sample: int) -> tuple[int, int]:
        """Shard number and place in it."""
        shard = bisect_right(self._ends, sample)
        return shard, sample - self._ends[shard] + self.sizes[shard]

    def _read(self, samples: Int64) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for run in np.split(samples, np.flatnonzero(np.diff(samples) != 1) + 1):
            sample, last = int(run[0]), int(run[-1]) + 1
            while sample < last:  # neighbours in the index may lie in two shards
                number, first = self._locate(sample)
                shard = self.split.shards[number]
                count = min(last - sample, shard.num_samples - first)
                parts = read_encoded(self.index.shard_uri(shard), shard, first, first + count)
                found.update(enumerate(parts, start=sample))
                sample += count
        return found

    def _fill(self, batch: _UnderWay, places: range, reads: dict[int, Future[dict[int, bytes]]]) -> None:
        for place in places:
            sample = int(batch.plan.samples[place])
            decoded = self._decode(reads[place], sample) if place in reads else self._cache[sample]
            if decoded is not None:
                batch.images[place] = decoded.image
                batch.found[place] = (decoded.key, decoded.label)

    def _decode(self, read: Future[dict[int, bytes]], sample: int) -> _Decoded | None:
        """The decoded sample, or None after counting why not."""
        number, place = self._locate(sample)
        shard = self.split.shards[number]
        where = self.index.shard_uri(shard)
        key = f"sample {place}"
        try:
            encoded = decode_sample(read.result()[sample], shard, place, where, len(self.index.class_names))
            key = encoded.key
            image = self._transform(decode_image(encoded.image))
        except (BadSampleError, UndecodableImageError) as error:
            self.ledger.skip(where, key, error.reason)
            return None
        if image.shape != self._blank.shape:
            raise DataError(f"the transform gave {tuple(image.shape)} for {key}, {tuple(self._blank.shape)} before")
        decoded = _Decoded(image, encoded.label, encoded.key)
        if len(self._cache) < self._cache_room:
            self._cache[sample] = decoded
        return decoded

    def _assemble(self, epoch: int, batch: _UnderWay) -> Batch:
        for group in batch.groups:
            group.result()
        kept = [place for place, found in enumerate(batch.found) if found is not None]
        keys_and_labels = [found for found in batch.found if found is not None]
        return Batch(
            epoch=epoch,
            step=batch.plan.step,
            images=batch.images if len(kept) == len(batch.found) else batch.images[kept],
            labels=torch.tensor([label for _, label in keys_and_labels], dtype=torch.int64),
            keys=tuple(key for key, _ in keys_and_labels),
            positions=tuple(batch.plan.positions[kept].tolist()),
            global_size=batch.plan.global_size,
        )


def default_skip_budget(num_samples: int) -> int:
    """How many samples of a split may be skipped unless told otherwise: 1 %, at least 8."""
    return max(8, num_samples // 100)


def default_num_threads() -> int:
    """Decoding threads unless told otherwise: the processors this process may use, at most 8."""
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


class TrainStream:
    """A rank's view of the training batches of one split.

    For the same (index, seed, batch_size, num_streams, window) the global batches, merged over ranks by position, are
    the same under every world size up to `num_streams`. With `num_parts` they are cut as that many ranks would share
    them, and a rank reads the parts that it has one after the other; by default it has one.

    `transform` (PIL RGB image → float [3, H, W]) must be deterministic: decoded images are kept for later epochs up to
    `cache_bytes` a rank.

    Raises DataError at once for an empty split, or more workers than streams; while reading, when more samples than
    the ledger's budget (default: 1 %, at least 8) could not be used, or a shard is missing.
    """

    def __init__(
        self,
        index: DatasetIndex,
        split: str,
        *,
        seed: int,
        batch_size: int,
        transform: Transform,
        num_streams: int = DEFAULT_NUM_STREAMS,
        world_size: int = 1,
        rank: int = 0,
        num_parts: int | None = None,
        num_threads: int | None = None,
        ledger: SkipLedger | None = None,
        window: int = DEFAULT_WINDOW,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        prefetch_batches: int = 2,
    ) -> None:
        if batch_size < 1 or window < 1 or seed < 0:
            raise DataError(f"batch_size {batch_size} and window {window} must be at least 1, seed {seed} at least 0")
        self.num_parts = world_size if num_parts is None else num_parts
        streams_of(rank, self.num_parts, num_streams)
        self.parts = streams_of(rank, world_size, self.num_parts)  # shared as streams are: neighbours, evenly
        threads = default_num_threads() if num_threads is None else num_threads
        prefetch = prefetch_batches * len(self.parts)
        self._reader = _SplitReader(index, split, transform, threads, prefetch, ledger, cache_bytes)
        if not self._reader.split.num_samples:
            raise DataError(f"split {split!r} of {index.name} ({index.uri}) is empty: there is nothing to train on")
        self.batch_size, self.num_streams, self.world_size, self.rank = batch_size, num_streams, world_size, rank
        self._seed, self._window = seed, window

    @property
    def ledger(self) -> SkipLedger:
        """What was skipped so far on this rank."""
        return self._reader.ledger

    @property
    def num_batches(self) -> int:
        """Global batches an epoch, the last one possibly smaller."""
        return -(-self._reader.split.num_samples // self.batch_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's parts of the global batches from `start_batch` on: a Batch for each part, empty ones included."""
        order = EpochOrder(self._reader.sizes, self._seed, epoch, self.num_streams, self._window)
        of_parts = [
            plan_epoch(order, batch_size=self.batch_size, world_size=self.num_parts, rank=part, start_batch=start_batch)
            for part in self.parts
        ]
        planned = chain.from_iterable(zip(*of_parts, strict=True))

        @lru_cache(maxsize=4 * self.num_streams)
        def samples_of_read(stream: int, window: int) -> Int64:
            return order.window_samples(stream, window)

        yield from self._reader.batches(epoch, planned, samples_of_read)


def eval_batches(
    index: DatasetIndex,
    split: str,
    *,
    batch_size: int,
    transform: Transform,
    batches: Iterable[int] | None = None,
    samples: Sequence[Int64] | None = None,
    num_threads: int | None = None,
    ledger: SkipLedger | None = None,
    prefetch_batches: int = 2,
) -> Iterator[Batch]:
    """The canonical batches of a split: batch k is samples [k·B, (k+1)·B) in index order, under any sharing of work.

    `batches` chooses some, in the given order (default: all); only their bytes are read. DataError for a batch that
    does not exist. `samples`: these batches of chosen samples (their ascending places in the split) instead; only what
    is chosen is read, neighbours by one range request.
    """
    threads = default_num_threads() if num_threads is None else num_threads
    reader = _SplitReader(index, split, transform, threads, prefetch_batches, ledger, cache_bytes=0)
    num_samples = reader.split.num_samples
    num_batches = -(-num_samples // batch_size)

    chosen = list(range(num_batches) if batches is None else batches)
    for batch in chosen:
        if not 0 <= batch < num_batches:
            raise DataError(f"split {split!r} of {index.name} has batches 0 … {num_batches - 1}, not {batch}")
    firsts = [batch * batch_size for batch in chosen]
    read = [np.arange(first, min(first + batch_size, num_samples), dtype=np.int64) for first in firsts]
    if samples is not None:
        chosen, read = list(range(len(samples))), [np.asarray(s, np.int64) for s in samples]

    def samples_of_read(_: int, turn: int) -> Int64:
        return read[turn] if turn < len(read) else np.zeros(0, np.int64)

    planned = (
        PlannedBatch(batch, read[turn], read[turn], ((0, turn),) * len(read[turn]), global_size=len(read[turn]))
        for turn, batch in enumerate(chosen)
    )
    yield from reader.batches(0, planned, samples_of_read)
