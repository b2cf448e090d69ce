"""The promises of the stream: what it reads is what is stored, resumable anywhere, damage that moves nothing."""

import http.server
import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diki_ray.data.images import decode_image
from diki_ray.data.index import DatasetIndex, find_prepared
from diki_ray.data.shards import Sample, SkipLedger, write_split
from diki_ray.data.stream import Batch, TrainStream, eval_batches
from diki_ray.errors import DataError, StorageError
from diki_ray.store.files import delete

WORKERS = (1, 2, 3, 4, 8, 24)
NUM_SAMPLES = 97
BATCH_SIZE = 16


# --- reading ---------------------------------------------------------------------------------------------------------


def transform(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.resize((8, 8))).copy()).permute(2, 0, 1).float()


def toy_samples(count: int = NUM_SAMPLES) -> list[Sample]:
    samples = []
    for i in range(count):
        out = io.BytesIO()
        Image.new("RGB", (8, 8), (i, 255 - i, 7)).save(out, "PNG")
        samples.append(Sample(f"class_{i % 5}/{i:03d}", out.getvalue(), "png", i % 5))
    return samples


def toy_index(folder: str, count: int = NUM_SAMPLES) -> DatasetIndex:
    splits = {
        "train": write_split(folder, "train", toy_samples(count), 5, max_shard_bytes=16384),
        "test": write_split(folder, "test", toy_samples(count), 5, max_shard_bytes=16384),
        "val": write_split(folder, "val", [], 5),
    }
    index = DatasetIndex(folder, "toy", tuple("abcde"), ("a {}.",), "own", splits)
    index.save()
    return index


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> DatasetIndex:
    return toy_index(str(tmp_path_factory.mktemp("toy")))


def stream(index: DatasetIndex, **changes) -> TrainStream:
    options = {"seed": 3, "batch_size": BATCH_SIZE, "transform": transform, "num_threads": 2, "window": 4} | changes
    return TrainStream(index, "train", **options)


def same(a: Batch, b: Batch) -> bool:
    return (
        (a.epoch, a.step, a.keys, a.positions, a.global_size) == (b.epoch, b.step, b.keys, b.positions, b.global_size)
        and torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
    )


def test_batches_hold_the_images_their_keys_name(index):
    by_key = {s.key: s for s in toy_samples()}
    batches = list(stream(index).epoch(0))
    assert sorted(key for batch in batches for key in batch.keys) == sorted(by_key)
    for batch in batches:
        assert batch.images.shape == (len(batch.keys), 3, 8, 8)
        assert batch.images.dtype == torch.float32
        assert batch.labels.dtype == torch.int64
        for key, image, label in zip(batch.keys, batch.images, batch.labels, strict=True):
            assert label == by_key[key].label
            assert image[0, 0, 0] == int(key[-3:])
    assert [b.global_size for b in batches] == [16] * 6 + [1]
    assert stream(index).num_batches == len(batches)


def test_ranks_together_read_what_one_reads(index):
    alone = list(stream(index).epoch(2))
    for world_size in (2, 3, 24):
        ranks = [list(stream(index, world_size=world_size, rank=r).epoch(2)) for r in range(world_size)]
        for whole, *parts in zip(alone, *ranks, strict=True):
            order = np.argsort([p for part in parts for p in part.positions])
            keys = [key for part in parts for key in part.keys]
            assert tuple(keys[i] for i in order) == whole.keys
            assert torch.equal(torch.cat([part.images for part in parts])[torch.from_numpy(order)], whole.images)


@pytest.mark.parametrize("start", range(8))
def test_a_resumed_epoch_continues_bit_for_bit(index, start):
    whole = list(stream(index).epoch(1))
    resumed = list(stream(index).epoch(1, start_batch=start))
    assert all(same(a, b) for a, b in zip(whole[start:], resumed, strict=True))


def test_a_second_epoch_from_memory_is_the_same_as_from_disk(index, tmp_path):
    warm = stream(index)
    list(warm.epoch(0))
    cold = list(stream(index, cache_bytes=0).epoch(1))
    assert all(same(a, b) for a, b in zip(warm.epoch(1), cold, strict=True))
    partly = stream(index, cache_bytes=10 * 3 * 64 * 4)
    list(partly.epoch(0))
    assert all(same(a, b) for a, b in zip(partly.epoch(1), cold, strict=True))


def test_a_split_that_fits_is_decoded_once(tmp_path):
    calls = []

    def counting(image: Image.Image) -> torch.Tensor:
        calls.append(1)
        return transform(image)

    index = toy_index(str(tmp_path))
    warm = stream(index, transform=counting)
    list(warm.epoch(0))
    for shard in index.splits["train"].shards:
        Path(index.shard_uri(shard)).unlink()
    assert sum(len(b.keys) for b in warm.epoch(1)) == NUM_SAMPLES
    assert len(calls) == NUM_SAMPLES + 1  # one to learn the shape


def test_a_consumer_may_stop_early(index):
    before = threading.active_count()
    for batch in stream(index).epoch(0):
        assert batch.step == 0
        break
    assert threading.active_count() <= before + 1


def test_an_empty_part_has_the_shape_of_the_others(tmp_path):
    index = toy_index(str(tmp_path), count=5)
    batches = list(stream(index, batch_size=3, world_size=24, rank=23).epoch(0))
    assert [(b.images.shape, b.labels.shape, b.keys, b.global_size) for b in batches] == [
        ((0, 3, 8, 8), (0,), (), 3),
        ((0, 3, 8, 8), (0,), (), 2),
    ]


def test_what_cannot_be_streamed_is_said_at_once(index):
    with pytest.raises(DataError, match="25 workers cannot share 24 streams"):
        stream(index, world_size=25)
    with pytest.raises(DataError, match=r"'val' of toy .* is empty"):
        TrainStream(index, "val", seed=0, batch_size=4, transform=transform)
    with pytest.raises(DataError, match="no split 'dev'"):
        TrainStream(index, "dev", seed=0, batch_size=4, transform=transform)
    with pytest.raises(DataError, match="batch_size 0"):
        stream(index, batch_size=0)


# --- damage ----------------------------------------------------------------------------------------------------------


def damage(index: DatasetIndex, shard_number: int, sample_number: int) -> str:
    """Flip a bit in one sample's image; its key."""
    shard = index.splits["train"].shards[shard_number]
    path = Path(index.shard_uri(shard))
    data = bytearray(path.read_bytes())
    data[sum(shard.blocks[:sample_number]) * 512 + 512 + 50] ^= 1
    path.write_bytes(data)
    return toy_samples()[sum(s.num_samples for s in index.splits["train"].shards[:shard_number]) + sample_number].key


def test_a_damaged_sample_leaves_the_others_where_they_are(tmp_path):
    index = toy_index(str(tmp_path))
    whole = list(stream(index).epoch(0))
    lost = {damage(index, 0, 2), damage(index, 1, 0)}
    damaged = stream(index)
    for a, b in zip(whole, damaged.epoch(0), strict=True):
        kept = [i for i, key in enumerate(a.keys) if key not in lost]
        assert b.keys == tuple(a.keys[i] for i in kept)
        assert b.positions == tuple(a.positions[i] for i in kept)
        assert torch.equal(b.images, a.images[kept])
        assert b.global_size == a.global_size
    assert damaged.ledger.counts == {"corrupt tar": 2}
    list(damaged.epoch(1))
    assert damaged.ledger.total == 2


def test_an_undecodable_image_is_skipped_with_its_reason(tmp_path):
    samples = toy_samples(20)
    samples[7] = Sample("broken/7", samples[7].image[:45], "png", 0)
    split = write_split(str(tmp_path), "train", samples, 5)
    index = DatasetIndex(str(tmp_path), "toy", tuple("abcde"), ("a {}.",), "own", {"train": split})
    s = stream(index)
    assert sum(len(b.keys) for b in s.epoch(0)) == 19
    assert list(s.ledger.counts) == ["truncated image"]


def test_over_budget_an_error_names_shard_and_key(tmp_path):
    index = toy_index(str(tmp_path))
    damage(index, 0, 2)
    with pytest.raises(DataError, match=r"sample 2 in .*train-000000\.tar \(corrupt tar\)"):
        list(stream(index, ledger=SkipLedger(budget=0)).epoch(0))


@pytest.mark.parametrize("length", [0, 4000])
def test_a_truncated_shard_costs_what_it_lost(tmp_path, length):
    index = toy_index(str(tmp_path))
    shard = index.splits["train"].shards[0]
    path = Path(index.shard_uri(shard))
    path.write_bytes(path.read_bytes()[:length])
    s = stream(index, ledger=SkipLedger())
    there = sum(np.cumsum(shard.blocks) * 512 <= length)
    assert sum(len(b.keys) for b in s.epoch(0)) == NUM_SAMPLES - shard.num_samples + there
    assert s.ledger.counts == {"truncated shard": shard.num_samples - there}


def test_a_missing_shard_is_an_error_that_names_it(tmp_path):
    index = toy_index(str(tmp_path))
    Path(index.shard_uri(index.splits["train"].shards[1])).unlink()
    with pytest.raises(StorageError, match=r"train-000001\.tar is missing"):
        list(stream(index, ledger=SkipLedger()).epoch(0))


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluated(index: DatasetIndex, **options) -> list[Batch]:
    return list(eval_batches(index, "test", batch_size=BATCH_SIZE, transform=transform, num_threads=2, **options))


def test_evaluation_reads_in_index_order(index):
    batches = evaluated(index)
    assert [key for b in batches for key in b.keys] == [s.key for s in toy_samples()]
    assert [p for b in batches for p in b.positions] == list(range(NUM_SAMPLES))
    assert [(b.step, b.global_size) for b in batches] == [(k, 16) for k in range(6)] + [(6, 1)]


def test_any_batches_can_be_evaluated_without_the_rest(tmp_path):
    index = toy_index(str(tmp_path))
    whole = evaluated(index)
    assert all(same(a, b) for a, b in zip([whole[6], whole[2]], evaluated(index, batches=[6, 2]), strict=True))
    shards = index.splits["test"].shards
    assert len(shards) > 3
    for shard in shards[2:]:  # batch 0 lies in the first two
        Path(index.shard_uri(shard)).unlink()
    assert same(whole[0], next(iter(evaluated(index, batches=[0]))))
    assert evaluated(index, batches=[]) == []
    with pytest.raises(DataError, match="batches 0 … 6, not 7"):
        evaluated(index, batches=[7])


def test_chosen_samples_are_read_without_the_rest(tmp_path, monkeypatch):
    index = toy_index(str(tmp_path))
    whole, decoded = evaluated(index), []
    monkeypatch.setattr("diki_ray.data.stream.decode_image", lambda data: decoded.append(data) or decode_image(data))
    chosen = [np.array([1, 2, 17, NUM_SAMPLES - 1]), np.array([40])]
    batches = evaluated(index, samples=chosen)
    assert len(decoded) == 5
    assert [b.positions for b in batches] == [(1, 2, 17, NUM_SAMPLES - 1), (40,)]
    everything, keys = torch.cat([b.images for b in whole]), [key for b in whole for key in b.keys]
    for batch, samples in zip(batches, chosen, strict=True):
        assert torch.equal(batch.images, everything[samples])
        assert batch.keys == tuple(keys[n] for n in samples)
    assert evaluated(index, samples=[]) == []


def test_an_empty_split_evaluates_to_nothing(index):
    assert list(eval_batches(index, "val", batch_size=4, transform=transform)) == []


# --- elsewhere than on disk ------------------------------------------------------------------------------------------


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """Just enough of HTTP's ranges for an object store's client."""

    def do_GET(self):
        data = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
        start, stop, status = 0, len(data), 200
        if requested := self.headers.get("Range"):
            first, _, last = requested.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(int(last or len(data) - 1) + 1, len(data)), 206
        self.send_response(status)
        self.send_header("Content-Length", str(stop - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[start:stop])

    def log_message(self, *_):
        pass


def test_shards_stream_from_http_alike(index):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: _Ranges(*a, directory=index.uri))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        remote = DatasetIndex.load(f"http://127.0.0.1:{server.server_port}")
        assert remote.digest() == index.digest()
        assert all(same(a, b) for a, b in zip(stream(index).epoch(0), stream(remote).epoch(0), strict=True))
    finally:
        server.shutdown()
        server.server_close()


def test_shards_are_written_to_and_stream_from_s3_alike(index, monkeypatch):
    moto_server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in {
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true",
        }.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="data")
        remote = toy_index("s3://data/prepared/toy")
        assert remote.digest() == index.digest()
        loaded = DatasetIndex.load("s3://data/prepared/toy")
        assert all(same(a, b) for a, b in zip(stream(index).epoch(0), stream(loaded).epoch(0), strict=True))
        named = toy_index("s3://data/named/toy-0123abcd")
        assert (find_prepared("s3://data/named/toy"), find_prepared("s3://data/named/to")) == (named.uri, None)
        delete(remote.shard_uri(remote.splits["test"].shards[0]))
        delete("s3://data/prepared/toy/never-there.tar")
        with pytest.raises(StorageError, match=r"test-000000\.tar is missing"):
            evaluated(loaded)
        with pytest.raises(DataError, match=r"there is no s3://data/nothing/index\.json"):
            DatasetIndex.load("s3://data/nothing")
    finally:
        server.stop()
