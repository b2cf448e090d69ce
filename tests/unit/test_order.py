"""The order of an epoch as arithmetic: every sample once, the same global batches whatever the workers."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diki_ray.data.order import EpochOrder, PlannedBatch, plan_epoch, streams_of
from diki_ray.errors import DataError

WORKERS = (1, 2, 3, 4, 8, 24)
NUM_SAMPLES = 97
BATCH_SIZE = 16

orders = st.builds(
    EpochOrder,
    shard_sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8).map(tuple),
    seed=st.integers(0, 2**80),
    epoch=st.integers(0, 1000),
    num_streams=st.sampled_from([24, 24, 25, 48]),
    window=st.sampled_from([1, 2, 7, 32]),
)


def planned(order: EpochOrder, batch_size: int, world_size: int, start_batch: int = 0) -> list[list[PlannedBatch]]:
    """By rank."""
    return [
        list(plan_epoch(order, batch_size=batch_size, world_size=world_size, rank=rank, start_batch=start_batch))
        for rank in range(world_size)
    ]


def merged(ranks: list[list[PlannedBatch]]) -> list[list[tuple[int, int]]]:
    """Global batches as (position, sample) in order of position."""
    return [
        sorted((p, s) for part in parts for p, s in zip(part.positions.tolist(), part.samples.tolist(), strict=True))
        for parts in zip(*ranks, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(order=orders, batch_size=st.integers(1, 70))
def test_every_sample_is_read_exactly_once_an_epoch(order, batch_size):
    batches = merged(planned(order, batch_size, world_size=3))
    positions = [p for batch in batches for p, _ in batch]
    samples = [s for batch in batches for _, s in batch]
    assert positions == list(range(sum(order.shard_sizes)))
    assert sorted(samples) == positions
    assert all(len(batch) == batch_size for batch in batches[:-1])


@settings(max_examples=40, deadline=None)
@given(order=orders, batch_size=st.integers(1, 70))
def test_global_batches_are_the_same_under_any_number_of_workers(order, batch_size):
    alone = merged(planned(order, batch_size, world_size=1))
    for world_size in WORKERS[1:]:
        ranks = planned(order, batch_size, world_size)
        assert merged(ranks) == alone
        assert all(part.global_size == len(batch) for rank in ranks for part, batch in zip(rank, alone, strict=True))


@settings(max_examples=40, deadline=None)
@given(order=orders, batch_size=st.integers(1, 70), world_size=st.sampled_from(WORKERS), data=st.data())
def test_resuming_at_any_batch_is_never_having_stopped(order, batch_size, world_size, data):
    num_batches = -(-sum(order.shard_sizes) // batch_size)
    start = data.draw(st.integers(0, num_batches))
    for whole, resumed in zip(
        planned(order, batch_size, world_size), planned(order, batch_size, world_size, start), strict=True
    ):
        for a, b in zip(whole[start:], resumed, strict=True):
            assert (a.step, a.reads, a.global_size) == (b.step, b.reads, b.global_size)
            assert np.array_equal(a.positions, b.positions)
            assert np.array_equal(a.samples, b.samples)


@settings(max_examples=60, deadline=None)
@given(order=orders, world_size=st.sampled_from(WORKERS))
def test_a_stream_reads_its_windows_front_to_back(order, world_size):
    """Each read is named once its samples are needed, in order, and is a few runs of neighbours."""
    for rank in planned(order, 13, world_size):
        seen: dict[int, int] = {}
        for batch in rank:
            for sample, (stream, window) in zip(batch.samples.tolist(), batch.reads, strict=True):
                assert seen.setdefault(stream, window) in (window, window - 1)
                seen[stream] = window
                assert sample in order.window_samples(stream, window)
    for stream in range(order.num_streams):
        for window in range(3):
            samples = order.window_samples(stream, window)
            assert np.count_nonzero(np.diff(samples) != 1) < len(order.shard_sizes)


@given(world_size=st.integers(1, 60), num_streams=st.integers(1, 60))
def test_ranks_share_the_streams_evenly(world_size, num_streams):
    if world_size > num_streams:
        with pytest.raises(DataError, match=f"at most {num_streams} workers"):
            streams_of(0, world_size, num_streams)
        return
    shares = [streams_of(rank, world_size, num_streams) for rank in range(world_size)]
    assert [v for share in shares for v in share] == list(range(num_streams))
    assert {len(share) for share in shares} <= {num_streams // world_size, -(-num_streams // world_size)}
    assert all(v * world_size // num_streams == rank for rank, share in enumerate(shares) for v in share)


def test_batches_may_be_empty_for_a_rank():
    order = EpochOrder((5,), seed=1, epoch=0, num_streams=24, window=32)
    ranks = planned(order, batch_size=3, world_size=24)
    assert [len(part.positions) for part in ranks[23]] == [0, 0]
    assert [part.global_size for part in ranks[23]] == [3, 2]


def test_epochs_and_seeds_differ_and_window_1_keeps_the_stored_order():
    def order(**changes) -> list[int]:
        fields = {"shard_sizes": (60, 60), "seed": 0, "epoch": 0, "num_streams": 2, "window": 32} | changes
        o = EpochOrder(**fields)
        return [int(s) for v in range(2) for s in o.samples(v, np.arange(60))]

    assert order() == order()
    assert len({tuple(order()), tuple(order(seed=1)), tuple(order(epoch=1)), tuple(order(seed=2**64))}) == 4
    assert order(window=1)[:60] in (list(range(60)), list(range(60, 120)))


def test_the_order_is_what_it_has_always_been():
    """Results say their seed; the order it stands for may not change with a version of ours or of numpy."""
    order = EpochOrder((400, 17, 583), seed=12345, epoch=7, num_streams=24, window=32)
    samples = [s for batch in planned(order, 64, 1)[0] for s in batch.samples.tolist()]
    assert hashlib.sha256(np.array(samples, "<i8").tobytes()).hexdigest()[:16] == "47350145de505b25"
