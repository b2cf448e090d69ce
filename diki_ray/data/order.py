"""The order of an epoch, as arithmetic: which sample is at which position, and which rank reads it.

    shards, permuted by (seed, epoch) ── concatenated ──▶ N places
    N places ── cut into V runs ──▶ stream v has ceil((N − v) / V) of them, permuted in windows of K
    global position p ──▶ stream p mod V at offset p div V;  batch b ──▶ positions [b·B, min((b+1)·B, N))
    rank r of W ──▶ the streams v with v·W div V = r

So a batch takes its share of every stream, each stream reads its shards front to back, and who reads a stream changes
nothing: the global batches are the same for every W ≤ V, and any of them can be computed without those before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from diki_ray.errors import DataError

Int64 = NDArray[np.int64]

DEFAULT_NUM_STREAMS = 24
"""Divisible by 1, 2, 3, 4, 6, 8, 12 and 24, so that ranks get equal shares under the usual numbers of workers."""

DEFAULT_WINDOW = 32
"""Neighbours that trade places from epoch to epoch; a rank holds up to two windows a stream in memory, undecoded."""


def _shuffled(length: int, seed: int, *purpose: int) -> Int64:
    # Sorted raw output, because numpy keeps its bit streams for good, but not what `permutation` makes of them.
    raw = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=purpose)).random_raw(length)
    return np.argsort(raw, kind="stable").astype(np.int64)


def streams_of(rank: int, world_size: int, num_streams: int) -> range:
    """The streams that a rank reads: ⌊V/W⌋ or ⌈V/W⌉ neighbours; DataError for more workers than streams."""
    if not 1 <= world_size <= num_streams:
        raise DataError(
            f"{world_size} workers cannot share {num_streams} streams: use at most {num_streams} workers, "
            "or set num_streams to at least their number (which changes the sample order)"
        )
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} is not one of {world_size} workers")
    return range(-(-rank * num_streams // world_size), -(-(rank + 1) * num_streams // world_size))


@dataclass(frozen=True)
class EpochOrder:
    """One epoch's order of a split whose shards hold `shard_sizes` samples. Samples are numbered in index order."""

    shard_sizes: tuple[int, ...]
    seed: int
    epoch: int
    num_streams: int
    window: int

    @cached_property
    def _shards(self) -> Int64:
        return _shuffled(len(self.shard_sizes), self.seed, self.epoch, 0)

    @cached_property
    def _shard_ends(self) -> Int64:
        """Where each shard ends in the concatenated sequence, in permuted order."""
        return np.cumsum(np.asarray(self.shard_sizes, dtype=np.int64)[self._shards])

    @cached_property
    def _shard_starts_in_index(self) -> Int64:
        return np.concatenate(([0], np.cumsum(np.asarray(self.shard_sizes, dtype=np.int64))))[:-1]

    @cached_property
    def _stream_starts(self) -> Int64:
        n, v = sum(self.shard_sizes), np.arange(self.num_streams, dtype=np.int64)
        return np.concatenate(([0], np.cumsum((n - v + self.num_streams - 1) // self.num_streams)))

    @cached_property
    def _places(self) -> dict[int, Int64]:
        return {}

    def _places_in_stream(self, stream: int) -> Int64:
        """Offset in the stream → place in its run of the sequence, for all offsets. Kept for the streams asked for."""
        if stream not in self._places:
            length = int(self._stream_starts[stream + 1] - self._stream_starts[stream])
            draw = _shuffled(length, self.seed, self.epoch, 1 + stream)
            # Sorted by window first, by the draw second.
            self._places[stream] = np.lexsort((draw, np.arange(length) // self.window)).astype(np.int64)
        return self._places[stream]

    def samples(self, stream: int, offsets: Int64) -> Int64:
        """The samples at these offsets of a stream."""
        places = self._stream_starts[stream] + self._places_in_stream(stream)[offsets]
        turn = np.searchsorted(self._shard_ends, places, side="right")
        shards = self._shards[turn]
        starts = self._shard_ends[turn] - np.asarray(self.shard_sizes, dtype=np.int64)[shards]
        return self._shard_starts_in_index[shards] + places - starts

    def window_samples(self, stream: int, window: int) -> Int64:
        """All samples of a stream's window in the order in which they lie: runs of neighbours within shards."""
        length = int(self._stream_starts[stream + 1] - self._stream_starts[stream])
        offsets = np.arange(window * self.window, min((window + 1) * self.window, length), dtype=np.int64)
        samples = self.samples(stream, offsets)
        return samples[np.argsort(self._places_in_stream(stream)[offsets])]


@dataclass(frozen=True)
class PlannedBatch:
    """What one rank reads of one global batch; the arrays have one entry a sample, in order of position.

    `reads` names for each sample the read that brings it: (stream, window) in training, (0, turn) in evaluation.
    """

    step: int
    positions: Int64
    samples: Int64
    reads: tuple[tuple[int, int], ...]
    global_size: int


def plan_epoch(
    order: EpochOrder, *, batch_size: int, world_size: int, rank: int, start_batch: int = 0
) -> Iterator[PlannedBatch]:
    """What rank `rank` reads in an epoch from global batch `start_batch` on; its part of a batch may be empty."""
    mine = streams_of(rank, world_size, order.num_streams)
    num_samples = sum(order.shard_sizes)
    for step in range(start_batch, -(-num_samples // batch_size)):
        first, last = step * batch_size, min((step + 1) * batch_size, num_samples)
        positions = np.arange(first, last, dtype=np.int64)
        streams = positions % order.num_streams
        mask = (streams >= mine.start) & (streams < mine.stop)
        positions, streams = positions[mask], streams[mask]
        offsets = positions // order.num_streams
        samples = np.empty_like(positions)
        for stream in np.unique(streams):
            here = streams == stream
            samples[here] = order.samples(int(stream), offsets[here])
        reads = tuple(zip(streams.tolist(), (offsets // order.window).tolist(), strict=True))
        yield PlannedBatch(step=step, positions=positions, samples=samples, reads=reads, global_size=last - first)
