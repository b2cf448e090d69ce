"""The index of a prepared data set: round trip, digest, and a sentence for everything that is wrong with one."""

import dataclasses
import hashlib
import json
import os
import pickle

import pytest

from diki_ray.data import index as indexes
from diki_ray.data import index_parts
from diki_ray.data.index import DatasetIndex, Shard, Split
from diki_ray.errors import DataError, StorageError
from diki_ray.store.files import read_bytes, scheme_of, write_bytes

SHA = "ab" * 32


def toy(uri: str, **changes) -> DatasetIndex:
    shard = Shard("train-000000.tar", 3, 10240, SHA, (4, 5, 6), (1, 0xFFFFFFFF, 3))
    fields = {
        "uri": str(uri),
        "name": "toy",
        "class_names": ("cat", "großer Hund"),
        "templates": ("a photo of a {}.", "the {}."),
        "split_protocol": "own",
        "splits": {"train": Split("train", (shard,), (1, 2)), "val": Split("val", (), (0, 0))},
        "provenance": {"layout": "toy"},
    }
    return DatasetIndex(**(fields | changes))


def test_load_returns_what_was_saved(tmp_path):
    toy(tmp_path).save()
    assert DatasetIndex.load(str(tmp_path)) == toy(tmp_path)
    assert DatasetIndex.load(f"{tmp_path}/index.json") == toy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["index.json"]


def test_digest_is_of_the_content_not_of_the_place():
    base = toy("a")
    assert base.digest("train") == toy("s3://b/c", name="other", provenance={}).digest("train")
    assert base.digest("train") != base.digest("val")
    assert base.digest() == base.digest("val", "train")
    changed = [
        toy("a", class_names=("cat", "dog")),
        toy("a", templates=("a {}.",)),
        toy("a", splits={"train": Split("train", (dataclasses.replace(_shard(), sha256="cd" * 32),), (1, 2))}),
    ]
    assert len({base.digest("train"), *(c.digest("train") for c in changed)}) == 4
    with pytest.raises(DataError, match="no split 'test', only"):
        base.digest("test")


def _shard() -> Shard:
    return toy("a").splits["train"].shards[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ()}, "at least one class"),
        ({"class_names": ("cat", " ")}, "no class name may be empty"),
        ({"templates": ("a photo",)}, "exactly one {}"),
        ({"templates": ()}, "at least one template"),
        ({"split_protocol": "mine"}, "split_protocol"),
        ({"splits": {"train": Split("train", (), (0,))}}, "2 classes"),
        ({"splits": {"train": Split("train", (), (1, 0))}}, "disagree"),
        ({"splits": {"train": Split("train", (_shard(), _shard()), (2, 4))}}, "listed twice"),
    ],
)
def test_an_inconsistent_index_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        toy("place", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "../../etc/passwd.tar"}, "not a shard's file name"),
        ({"file": "pipe:cat x.tar"}, "not a shard's file name"),
        ({"file": "x.zip"}, "not a shard's file name"),
        ({"num_bytes": 1024}, "do not fit"),
        ({"blocks": (4, 5)}, "lists 2 lengths"),
        ({"blocks": (4, 5, 1)}, "do not fit"),
        ({"sha256": "?"}, "no SHA-256"),
    ],
)
def test_an_index_that_lies_about_a_shard_is_refused(changes, message):
    split = Split("train", (dataclasses.replace(_shard(), **changes),), (1, 2))
    with pytest.raises(DataError, match=message):
        toy("place", splits={"train": split})


def test_a_missing_index_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"diki-ray prepare"):
        DatasetIndex.load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"format": 1}', b"\xff\xfe", b'{"format": 99}', b"null"])
def test_a_garbled_index_is_a_data_error(tmp_path, content):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(DataError):
        DatasetIndex.load(str(tmp_path))


def test_a_changed_index_does_not_pass_its_checksum(tmp_path):
    toy(tmp_path).save()
    path = tmp_path / "index.json"
    path.write_text(path.read_text().replace("cat", "cot"))
    with pytest.raises(DataError, match="checksum"):
        DatasetIndex.load(str(tmp_path))


def test_every_truncation_is_noticed(tmp_path):
    toy(tmp_path).save()
    whole = (tmp_path / "index.json").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "index.json").write_bytes(whole[:length])
        with pytest.raises(DataError):
            DatasetIndex.load(str(tmp_path))


@pytest.mark.parametrize(
    "uri", ["pipe:cat /etc/passwd", "file:///etc/passwd", "ftp://host/x", "PIPE:x", "s3:bucket", "data:,x"]
)
def test_only_known_places_are_opened(uri):
    with pytest.raises(DataError, match="nothing else is opened"):
        DatasetIndex.load(uri)


def test_known_places_are_known():
    assert [scheme_of(u) for u in ("a/b", "/a", "s3://b/k", "https://h/p", "gs://b")] == ["", "", "s3", "https", "gs"]


def test_a_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    target = str(tmp_path / "deep" / "x")
    write_bytes(target, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left"):
        write_bytes(target, b"new")
    assert read_bytes(target) == b"old"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x"]


def test_a_save_is_readable_json(tmp_path):
    toy(tmp_path).save()
    content = json.loads((tmp_path / "index.json").read_text())
    assert content["splits"]["train"]["shards"][0]["blocks"] == "4 5 6"
    assert content["splits"]["train"]["shards"][0]["crc32"] == "00000001ffffffff00000003"


@pytest.fixture
def in_parts(tmp_path, monkeypatch):
    """Six shards of 3 samples, saved as a large index is: two shards a part."""
    monkeypatch.setattr(indexes, "MOST_INLINE_SAMPLES", 10)
    monkeypatch.setattr(index_parts, "PART_SAMPLES", 6)
    shards = tuple(Shard(f"train-{n:06d}.tar", 3, 10240, SHA, (4 + n, 5, 6), (n, 0xFFFFFFFF, 3)) for n in range(6))
    whole = toy(tmp_path, splits={"train": Split("train", shards, (6, 12))})
    whole.save()
    return whole


def test_of_a_large_index_the_samples_are_read_when_they_are_asked_for(tmp_path, in_parts, monkeypatch):
    read = []

    def counted(uri, *arguments):
        read.append(uri.rpartition("/")[2])
        return read_bytes(uri, *arguments)

    monkeypatch.setattr(index_parts, "read_bytes", counted)
    opened = DatasetIndex.load(str(tmp_path))
    shards = opened.split("train").shards
    assert (opened.split("train").num_samples, len(shards[5].blocks), read) == (18, 3, [])
    assert opened.digest() == in_parts.digest()
    again = pickle.loads(pickle.dumps(shards[4]))
    assert [tuple(again.blocks[:2]), shards[4].crc32[1]] == [(8, 5), 0xFFFFFFFF]
    assert read == ["part-000002.index.json"]
    for shard, right in zip(shards, in_parts.split("train").shards, strict=True):
        assert (tuple(shard.blocks), tuple(shard.crc32)) == (right.blocks, right.crc32)
    assert sorted(read) == [f"part-{n:06d}.index.json" for n in range(3)]
    opened.save()
    assert DatasetIndex.load(str(tmp_path)) == opened


def test_a_damaged_part_of_an_index_is_said_to_be(tmp_path, in_parts):
    shards = DatasetIndex.load(str(tmp_path)).split("train").shards
    first, second, _ = sorted(tmp_path.glob("part-*"))
    first.write_bytes(first.read_bytes().replace(b"4 5", b"5 5"))
    second.unlink()
    for shard, said in ((shards[0], "does not have the checksum"), (shards[2], "there is no .*part-000001")):
        with pytest.raises(DataError, match=said):
            shard.blocks[0]
    assert shards[4].blocks[0] == 8
    content = json.loads((tmp_path / "index.json").read_text())
    content["splits"]["train"]["shards"][4]["part"][0] = "../elsewhere/part-000002.index.json"
    del content["checksum"]
    content["checksum"] = hashlib.sha256(indexes._canonical(content)).hexdigest()
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="is no part of an index"):
        DatasetIndex.load(str(tmp_path))


def test_an_index_of_a_hundred_million_samples_opens_without_any_of_them(tmp_path):
    """Its parts are not even there."""
    num_shards, in_shard = 10_000, 10_000
    content = {
        "format": indexes.FORMAT_IN_PARTS,
        "name": "large",
        "split_protocol": "own",
        "templates": ["a photo of a {}."],
        "class_names": ["one"],
        "provenance": {},
        "splits": {
            "train": {
                "num_samples": num_shards * in_shard,
                "samples_per_class": [num_shards * in_shard],
                "shards": [
                    Shard(f"train-{n:06d}.tar", in_shard, 10**9, SHA).as_json((f"part-{n // 6:06d}.index.json", SHA))
                    for n in range(num_shards)
                ],
            }
        },
    }
    content["checksum"] = hashlib.sha256(indexes._canonical(content)).hexdigest()
    (tmp_path / "index.json").write_text(json.dumps(content))
    opened = DatasetIndex.load(str(tmp_path))
    assert opened.split("train").num_samples == 100_000_000
    assert len(pickle.dumps(opened)) < 8e6  # what a worker is sent
