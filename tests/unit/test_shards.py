"""Shards are written alike byte for byte, read by any tool, and never trusted."""

import dataclasses
import gzip
import hashlib
import io
import os
import pickle
import tarfile
import zlib
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diki_ray.data import shards
from diki_ray.data.index import Shard
from diki_ray.data.shards import (
    BadSampleError,
    Sample,
    SkipLedger,
    decode_sample,
    encode_sample,
    read_encoded,
    read_shard,
    write_split,
)
from diki_ray.errors import DataError, StorageError

NUM_CLASSES = 4


def picture(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, 0, 0)).save(out, "PNG")
    return out.getvalue()


def some_samples(count: int = 10) -> list[Sample]:
    return [Sample(f"class_{i % 4}/{i:03d}", picture(i), "png", i % NUM_CLASSES) for i in range(count)]


def tar_of(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> str:
    """A tar with these members, as somebody else might have written it."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def read_all(uri: str, budget: int | None = None) -> tuple[list[Sample], dict[str, int]]:
    ledger = SkipLedger(budget)
    return list(read_shard(uri, num_classes=NUM_CLASSES, ledger=ledger)), ledger.counts


# --- writing ---------------------------------------------------------------------------------------------------------


def test_the_same_samples_give_the_same_bytes(tmp_path):
    first = write_split(str(tmp_path / "a"), "train", some_samples(), NUM_CLASSES)
    second = write_split(str(tmp_path / "b"), "train", iter(some_samples()), NUM_CLASSES)
    assert first == second
    data = (tmp_path / "a" / "train-000000.tar").read_bytes()
    assert data == (tmp_path / "b" / "train-000000.tar").read_bytes()
    shard = first.shards[0]
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (shard.sha256, shard.num_bytes)
    assert first.samples_per_class == (3, 3, 2, 2)


def test_a_shard_is_closed_before_it_is_too_large(tmp_path):
    split = write_split(str(tmp_path), "train", some_samples(), NUM_CLASSES, max_shard_bytes=8192)
    assert len(split.shards) > 2
    assert all(shard.num_bytes <= 8192 + 1024 for shard in split.shards)
    read = [s for shard in split.shards for s in read_shard(f"{tmp_path}/{shard.file}")]
    assert read == some_samples()


def test_a_single_sample_may_be_larger_than_a_shard(tmp_path):
    assert len(write_split(str(tmp_path), "train", some_samples(2), NUM_CLASSES, max_shard_bytes=1).shards) == 2


def test_an_empty_split_has_no_shard(tmp_path):
    split = write_split(str(tmp_path), "val", [], NUM_CLASSES)
    assert (split.shards, split.samples_per_class, split.num_samples) == ((), (0, 0, 0, 0), 0)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("a", b"", "png", 4), "outside 0 … 3"),
        (Sample("a", b"", "png", -1), "outside"),
        (Sample("a", b"", "pkl", 0), "not an image"),
        (Sample("../a", b"", "png", 0), "cannot be a sample's key"),
        (Sample("/a", b"", "png", 0), "cannot be a sample's key"),
        (Sample("a.b", b"", "png", 0), "cannot be a sample's key"),
        (Sample("", b"", "png", 0), "cannot be a sample's key"),
        (Sample("x" * 91, b"", "png", 0), "cannot be a sample's key"),
    ],
)
def test_a_sample_that_could_not_be_read_back_is_not_written(tmp_path, sample, message):
    with pytest.raises(DataError, match=message):
        write_split(str(tmp_path), "train", [sample], NUM_CLASSES)
    assert not list(tmp_path.iterdir())


def test_a_key_used_twice_is_an_error(tmp_path):
    with pytest.raises(DataError, match="two samples have the key"):
        write_split(str(tmp_path), "train", [*some_samples(2), some_samples(1)[0]], NUM_CLASSES)


def test_webdataset_itself_reads_a_shard(tmp_path):
    split = write_split(str(tmp_path), "train", some_samples(), NUM_CLASSES)
    stream = webdataset.WebDataset(f"{tmp_path}/{split.shards[0].file}", shardshuffle=False)
    assert [(s["__key__"], s["png"], int(s["cls"])) for s in stream] == [
        (s.key, s.image, s.label) for s in some_samples()
    ]
    assert os.environ["WDS_SECURE"] == "1"


# --- hostile tars ----------------------------------------------------------------------------------------------------


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth", "pt", "npy"])
def test_a_pickle_in_a_tar_never_runs(tmp_path, extension):
    target = tmp_path / "it-ran"
    evil = pickle.dumps(Payload(target))
    uri = tar_of(tmp_path / "x.tar", [("a.png", picture(1)), ("a.cls", b"1"), (f"a.{extension}", evil)])
    samples, counts = read_all(uri)
    assert [s.key for s in samples] == ["a"]
    assert counts == {"pickle, not read": 1}
    # Nor under the name of a label or an image.
    uri = tar_of(tmp_path / "y.tar", [("a.png", evil), ("a.cls", evil)])
    assert read_all(uri) == ([], {"label is not a number": 1})
    assert not target.exists()
    pickle.loads(evil)
    assert target.exists()  # the payload does work


def _special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ("../a.png", "unsafe name"),
        ("x/../../a.png", "unsafe name"),
        ("/etc/a.png", "unsafe name"),
        ("a\x07.png", "unsafe name"),
        ("a\\b.png", "unsafe name"),
        ("C:x.png", "unsafe name"),
        ("n" * 300 + ".png", "unsafe name"),
        (_special("a.png", tarfile.SYMTYPE, "/etc/passwd"), "not a regular file"),
        (_special("a.png", tarfile.LNKTYPE, "good.png"), "not a regular file"),
        (_special("a.png", tarfile.CHRTYPE), "not a regular file"),
        (_special("a.png", tarfile.BLKTYPE), "not a regular file"),
        (_special("a.png", tarfile.FIFOTYPE), "not a regular file"),
    ],
)
def test_names_that_leave_the_folder_links_and_devices_are_passed_over(tmp_path, member, reason):
    good = [("good.png", picture(1)), ("good.cls", b"2")]
    data = b"" if isinstance(member, tarfile.TarInfo) else picture(2)
    uri = tar_of(tmp_path / "x.tar", [*good, (member, data)])
    samples, counts = read_all(uri)
    assert [s.key for s in samples] == ["good"]
    assert counts == {reason: 1}
    assert {p.name for p in tmp_path.iterdir()} == {"x.tar"}
    with pytest.raises(DataError, match=r"x\.tar"):
        read_all(uri, budget=0)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("b.png", b"x")], "no label"),
        ([("b.cls", b"1")], "no image"),
        ([("b.png", b"x"), ("b.jpg", b"x"), ("b.cls", b"1")], "more than one image"),
        ([("b.png", b"x"), ("b.cls", b"4")], "label out of range"),
        ([("b.png", b"x"), ("b.cls", b"-1")], "label is not a number"),
        ([("b.png", b"x"), ("b.cls", b"1e3")], "label is not a number"),
        ([("b.png", b"x"), ("b.cls", b"")], "label is not a number"),
        ([("b.png", b"x"), ("b.cls", b"9" * 4400)], "label is not a number"),
        ([("b.png", b"x"), ("b.cls", "²".encode())], "label is not a number"),
        ([("b.png", b"x"), ("b.cls", b"1"), ("b.cls", b"2")], "duplicate name"),
        ([("a.png", b"x"), ("a.cls", b"1")], "duplicate key"),
    ],
)
def test_bad_samples_are_counted_by_reason_and_leave_the_others(tmp_path, members, reason):
    around = [
        ("a.png", b"A"),
        ("a.cls", b"1"),
        *([] if members[0][0][0] == "b" else [("m.png", b"M"), ("m.cls", b"0")]),
    ]
    uri = tar_of(tmp_path / "x.tar", [*around, *members, ("z.png", b"Z"), ("z.cls", b"3")])
    samples, counts = read_all(uri)
    assert samples[0] == Sample("a", b"A", "png", 1)
    assert samples[-1] == Sample("z", b"Z", "png", 3)
    assert counts == {reason: 1}


def test_other_members_are_passed_over_unread(tmp_path):
    members = [("__meta__", b"x"), ("a.json", b"{"), ("a.png", b"A"), ("a.cls", b"1\n"), ("LICENSE", b"")]
    assert read_all(tar_of(tmp_path / "x.tar", members)) == ([Sample("a", b"A", "png", 1)], {})


def test_a_compressed_tar_is_not_unpacked(tmp_path):
    plain = Path(tar_of(tmp_path / "x.tar", [("a.png", bytes(10**6)), ("a.cls", b"1")])).read_bytes()
    (tmp_path / "z.tar").write_bytes(gzip.compress(plain))
    assert read_all(str(tmp_path / "z.tar")) == ([], {"corrupt tar (ReadError)": 1})


def test_a_sparse_member_is_not_expanded(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**40)}
    samples, counts = read_all(tar_of(tmp_path / "x.tar", [(info, b"1\n0\n0\n".ljust(512, b"\0"))]))
    assert samples == []
    assert sum(counts.values()) == 1


@pytest.mark.parametrize("place", ["header", "middle", "tail", "empty"])
def test_a_corrupt_tar_ends_early_and_is_counted(tmp_path, place):
    split = write_split(str(tmp_path), "train", some_samples(), NUM_CLASSES)
    path = tmp_path / split.shards[0].file
    data = bytearray(path.read_bytes())
    step = split.shards[0].blocks[0] * 512
    if place in ("header", "middle"):
        start = 0 if place == "header" else 5 * step
        data[start : start + 512] = b"\xff" * 512
    path.write_bytes({"tail": data[: 7 * step + 600], "empty": b""}.get(place, bytes(data)))
    samples, counts = read_all(str(path))
    assert samples == some_samples()[: {"header": 0, "middle": 5, "tail": 7, "empty": 0}[place]]
    assert next(iter(counts)).startswith("corrupt tar")


@pytest.mark.parametrize("uri", ["pipe:touch it-ran", "file:///etc/passwd", "gopen:x"])
def test_other_places_are_refused(uri):
    with pytest.raises(DataError, match="nothing else is opened"):
        list(read_shard(uri))


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"no\.tar"):
        list(read_shard(f"{tmp_path}/no.tar"))


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_the_ledger_counts_a_sample_once_and_names_the_one_too_many():
    ledger = SkipLedger(budget=2)
    for _ in range(3):
        ledger.skip("s.tar", "a", "truncated image")
    ledger.skip("s.tar", "b", "no label")
    assert ledger.counts == {"truncated image": 1, "no label": 1}
    with pytest.raises(DataError, match=r"c in t\.tar \(corrupt tar\)") as error:
        ledger.skip("t.tar", "c", "corrupt tar")
    assert "budget is 2" in str(error.value)


# --- random access ---------------------------------------------------------------------------------------------------


def whole(folder: Path, shard: Shard) -> list[Sample | str]:
    """What a stream sees of a shard: every sample, or the reason why not."""
    found: list[Sample | str] = []
    for number, part in enumerate(read_encoded(f"{folder}/{shard.file}", shard, 0, shard.num_samples)):
        try:
            found.append(decode_sample(part, shard, number, shard.file, NUM_CLASSES))
        except BadSampleError as error:
            found.append(error.reason)
    return found


def test_any_run_of_samples_is_read_by_itself(tmp_path):
    shard = write_split(str(tmp_path), "train", some_samples(), NUM_CLASSES).shards[0]
    assert whole(tmp_path, shard) == some_samples()
    parts = read_encoded(f"{tmp_path}/{shard.file}", shard, 3, 5)
    assert [decode_sample(p, shard, 3 + i, "x", NUM_CLASSES) for i, p in enumerate(parts)] == some_samples()[3:5]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_the_short_way_to_a_sample_finds_what_tarfile_finds_or_nothing(data):
    """Whatever the bytes: samples as we lay them are not opened as archives, and that shows in nothing but time."""
    sample = data.draw(st.sampled_from(some_samples()))
    encoded = bytearray(encode_sample(sample, NUM_CLASSES))
    assert shards._as_written(bytes(encoded)) is not None
    header = data.draw(st.sampled_from([0, len(encoded) - 1024]))  # of the image, of the label
    for _ in range(data.draw(st.integers(0, 3))):
        encoded[header + data.draw(st.integers(0, 511))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # a header that somebody wrote on purpose
        fields = encoded[header : header + 512]
        encoded[header + 148 : header + 156] = b"%06o\0 " % (sum(fields) - sum(fields[148:156]) + 256)
    changed = bytes(encoded[: data.draw(st.sampled_from([len(encoded), len(encoded) - 512, 700, 0]))])
    found = shards._as_written(changed)
    if found is not None:
        members = shards._members(io.BytesIO(changed), "x", SkipLedger(budget=0))
        (group,) = shards._grouped(members)
        assert {name: value for name, value in group.items() if name in found} == found


def test_a_checksum_that_agrees_does_not_excuse_a_bad_sample(tmp_path):
    """An index and a tar that were both made to deceive: links, pickles and labels out of range still don't pass."""
    members = [("a.png", picture(1)), ("a.cls", b"77")]
    for extra in ((_special("b.png", tarfile.SYMTYPE, "/etc/passwd"), b""), ("b.pkl", b"\x80\x04.")):
        data = Path(tar_of(tmp_path / "x.tar", [*members, extra])).read_bytes()
        shard = Shard("x.tar", 1, len(data), "0" * 64, (len(data) // 512,), (zlib.crc32(data),))
        assert whole(tmp_path, shard) == ["not a sample"]
    data = Path(tar_of(tmp_path / "x.tar", members)).read_bytes()
    shard = dataclasses.replace(shard, blocks=(len(data) // 512,), crc32=(zlib.crc32(data),))
    assert whole(tmp_path, shard) == ["label out of range"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    shard = write_split(str(folder), "train", some_samples(), NUM_CLASSES).shards[0]
    return folder, shard, (folder / shard.file).read_bytes()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_mutated_tar_costs_the_samples_it_hit_and_no_others(pristine, data):
    folder, shard, original = pristine
    content = bytearray(original)
    hit = set()
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(content) - 1025))
        content[place] ^= data.draw(st.integers(1, 255))
        hit.add(place)
    length = data.draw(st.sampled_from([len(content), data.draw(st.integers(0, len(content)))]))
    (folder / "mutated.tar").write_bytes(content[:length])
    seen = whole(folder, dataclasses.replace(shard, file="mutated.tar"))
    start = 0
    for number, (blocks, sample) in enumerate(zip(shard.blocks, seen, strict=True)):
        stop = start + blocks * 512
        untouched = stop <= length and content[start:stop] == original[start:stop]
        assert (sample == some_samples()[number]) if untouched else isinstance(sample, str)
        start = stop


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_reading_a_mutated_tar_without_its_index_raises_nothing_but_data_errors(pristine, data):
    folder, _, original = pristine
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 8))):
        # Headers are where the parser's decisions are: aim at them half of the time.
        block = data.draw(st.integers(0, len(content) // 512 - 1))
        content[block * 512 + data.draw(st.integers(0, 511))] = data.draw(st.integers(0, 255))
    (folder / "fuzzed.tar").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    ledger = SkipLedger(budget=1)
    try:
        for sample in read_shard(str(folder / "fuzzed.tar"), num_classes=NUM_CLASSES, ledger=ledger):
            assert 0 <= sample.label < NUM_CLASSES
    except DataError:
        assert ledger.total == 2
