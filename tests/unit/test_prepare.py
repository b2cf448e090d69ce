"""Preparing is choosing by hashes, writing once, and saying what was found."""

import dataclasses
import io
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diki_ray.data import prepare
from diki_ray.data.index import DatasetIndex
from diki_ray.data.prepare import Settings, ensure, plan, summary, write_job
from diki_ray.data.shards import MAX_KEY_LENGTH, read_shard
from diki_ray.data.sources import embedded
from diki_ray.data.sources.choice import choose, keys_of
from diki_ray.data.sources.raw import FileReader, RawDataset, RawItem
from diki_ray.data.stream import TrainStream, eval_batches
from diki_ray.data.world import tasks as world
from diki_ray.errors import DataError


def picture(shade: int, kind: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(shade).integers(0, 255, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(out, kind)
    return out.getvalue()


def put_folders(root: Path, per_class: int = 12, classes: tuple[str, ...] = ("cat", "dog", "owl")) -> Path:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            (root / name / f"{i:03d}.jpg").write_bytes(picture(100 * c + i))
    return root


def contents(index: DatasetIndex) -> dict[str, list[tuple[str, bytes, int]]]:
    return {
        name: [(s.key, s.image, s.label) for shard in split.shards for s in read_shard(index.shard_uri(shard))]
        for name, split in index.splits.items()
    }


# --- choosing --------------------------------------------------------------------------------------------------------


def raw_of(per_class: list[int], **splits) -> RawDataset:
    items = [RawItem(f"c{c}/{i}.jpg", c, 1000) for c, count in enumerate(per_class) for i in range(count)]
    return RawDataset(
        name="toy",
        layout="toy",
        class_names=tuple(f"c{c}" for c in range(len(per_class))),
        splits={"train": tuple(items), **splits},
        reader=FileReader("."),
    )


@settings(max_examples=60, deadline=None)
@given(per_class=st.lists(st.integers(0, 30), min_size=1, max_size=6), seed=st.integers(0, 1000), shuffle=st.randoms())
def test_choosing_depends_on_the_images_not_on_their_listing(per_class, seed, shuffle):
    raw = raw_of(per_class)
    listed = list(raw.splits["train"])
    shuffle.shuffle(listed)
    if not any(per_class):
        with pytest.raises(DataError, match="no training images"):
            choose(raw, seed=seed)
        return
    choice = choose(raw, seed=seed)
    assert choice == choose(dataclasses.replace(raw, splits={"train": tuple(listed)}), seed=seed)
    chosen = [item for items in choice.splits.values() for item in items]
    assert Counter(chosen) == Counter(listed)  # each image in exactly one split
    for label, count in enumerate(per_class):
        sizes = {split: sum(i.label == label for i in items) for split, items in choice.splits.items()}
        test = max(1, round(0.2 * count)) if count > 1 else 0
        rest = count - test
        assert sizes["test"] == test
        assert sizes["val"] == (max(1, round(0.2 * rest)) if rest > 1 else 0)


def test_seeds_choose_differently():
    a, b = (choose(raw_of([20, 20]), seed=seed).splits["val"] for seed in (0, 1))
    assert {i.ref for i in a} != {i.ref for i in b}


def test_shots_are_k_of_train_and_at_most_4_of_val_and_nested():
    val = tuple(RawItem(f"v{c}/{i}.jpg", c, 1) for c in range(2) for i in range(9))
    test = tuple(RawItem(f"t/{i}.jpg", 0, 1) for i in range(50))
    raw = raw_of([40, 10], val=val, test=test)

    def drawn(shots: int) -> dict[str, list[RawItem]]:
        return {s: list(items) for s, items in choose(raw, shots=shots).splits.items()}

    def per_class(items: list[RawItem]) -> list[int]:
        return [sum(i.label == c for i in items) for c in range(2)]

    assert per_class(drawn(16)["train"]) == [16, 10]  # all there are
    assert [per_class(drawn(k)["val"]) for k in (1, 2, 16)] == [[1, 1], [2, 2], [4, 4]]
    assert len(drawn(1)["test"]) == 50
    assert set(drawn(4)["train"]) < set(drawn(8)["train"]) < set(drawn(16)["train"])


def test_splits_are_written_shuffled():
    labels = [i.label for i in choose(raw_of([50, 50])).splits["train"]]
    changes = sum(a != b for a, b in pairwise(labels))
    assert changes > 20


def test_what_is_odd_is_said():
    train = raw_of([5, 5, 0]).splits["train"]
    raw = dataclasses.replace(raw_of([5, 5, 0]), splits={"train": (*train, train[0]), "test": (train[1],)})
    choice = choose(raw)
    assert choice.skipped == {"listed twice": 1}
    text = "\n".join(choice.notes)
    assert "no val images of its own: 20% a class" in text
    assert "both in train and in test" in text or "both in val and in test" in text


def test_a_label_out_of_range_is_refused_before_anything_is_written():
    with pytest.raises(DataError, match="label 3, but there are 2 classes"):
        choose(dataclasses.replace(raw_of([1, 1]), splits={"train": (RawItem("x", 3, 1),)}))


@given(st.lists(st.text(min_size=1, max_size=150), min_size=1, max_size=8, unique=True))
def test_keys_are_unique_and_can_be_written(refs):
    keys = keys_of([RawItem(ref, 0, 1) for ref in refs])
    assert len(set(keys)) == len(keys)
    assert all(len(key) <= MAX_KEY_LENGTH for key in keys)
    for key in keys:
        prepare.encode_sample(prepare.Sample(key, b"", "png", 0), 1)


def test_plain_paths_are_their_own_keys():
    items = [RawItem(ref, 0, 1) for ref in ("a/b_1.jpg", "a/b_1.png", "a/c.d.jpg", "train/000001")]
    keys = keys_of(items)
    assert keys[3] == "train/000001"
    assert [k.partition("-")[0] for k in keys] == ["a/b_1", "a/b_1", "a/c_d", "train/000001"]


# --- writing ---------------------------------------------------------------------------------------------------------


def test_the_images_own_bytes_are_kept(tmp_path):
    source = put_folders(tmp_path / "pets")
    index = ensure(str(source), str(tmp_path / "out"))
    found = contents(index)
    assert {s: len(rows) for s, rows in found.items()} == {"train": 24, "val": 6, "test": 6}
    for rows in found.values():
        for key, image, label in rows:
            assert image == (source / f"{key}.jpg").read_bytes()
            assert index.class_names[label] == key.split("/")[0]
    assert index.templates == ("a photo of a {}.",)
    assert index.splits["train"].samples_per_class == (8, 8, 8)


def test_the_same_source_and_settings_give_the_same_bytes(tmp_path):
    put_folders(tmp_path / "a" / "pets")
    put_folders(tmp_path / "b" / "pets")
    first = ensure(str(tmp_path / "a" / "pets"), str(tmp_path / "one"))

    def shuffled(function, jobs):
        return [function(job) for job in random.Random(0).sample(jobs, len(jobs))]

    second = ensure(str(tmp_path / "b" / "pets"), str(tmp_path / "two"), run=shuffled)
    a, b = Path(first.uri), Path(second.uri)
    assert a.name == b.name
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}
    assert first.digest() == second.digest()


def test_a_second_run_reuses_what_is_there(tmp_path):
    source = str(put_folders(tmp_path / "pets"))
    first = ensure(source, str(tmp_path / "out"))

    def never(*_):
        raise AssertionError("prepared again")

    assert ensure(source, str(tmp_path / "out"), run=never) == first
    others = [
        ensure(source, str(tmp_path / "out"), **change)
        for change in ({"seed": 1}, {"shots": 2}, {"template": "the {}."}, {"resize_px": 16})
    ]
    assert len({index.uri for index in (first, *others)}) == 5
    (tmp_path / "pets" / "cat" / "new.jpg").write_bytes(picture(999))
    assert ensure(source, str(tmp_path / "out")).uri != first.uri


def test_a_lost_or_damaged_part_is_written_again(tmp_path):
    source = str(put_folders(tmp_path / "pets"))
    first = ensure(source, str(tmp_path / "out"))
    before = {p.name: p.read_bytes() for p in Path(first.uri).iterdir()}
    shard = Path(first.shard_uri(first.splits["train"].shards[0]))
    for damage in (shard.unlink, lambda: shard.write_bytes(b""), lambda: Path(first.uri, "index.json").write_text("{")):
        damage()
        assert ensure(source, str(tmp_path / "out")) == first
        assert {p.name: p.read_bytes() for p in Path(first.uri).iterdir()} == before


def test_a_stopped_preparation_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_MIN_SHARD_BYTES", 8192)
    source, out = str(put_folders(tmp_path / "pets")), str(tmp_path / "out")
    whole = ensure(source, str(tmp_path / "other"))
    jobs = plan(source, out).jobs
    assert len(jobs) > 4

    def stopped(function, jobs):
        for job in jobs[:3]:
            yield function(job)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(source, out, run=stopped)
    with pytest.raises(DataError, match="did not finish"):
        DatasetIndex.load(jobs[0].folder)
    # One of the finished shards is damaged meanwhile: its note alone does not make it good.
    Path(jobs[1].folder, jobs[1].file).write_bytes(b"half")
    read: list[str] = []

    class Watching(FileReader):
        def read(self, ref: str) -> tuple[bytes, str]:
            read.append(ref)
            return super().read(ref)

    def watched(function, jobs):
        return [function(dataclasses.replace(job, reader=Watching(job.reader.root))) for job in jobs]

    resumed = ensure(source, out, run=watched)
    assert resumed.digest() == whole.digest()
    assert {i.ref for job in (jobs[0], jobs[2]) for i in job.items}.isdisjoint(read)
    assert {i.ref for i in jobs[1].items} <= set(read)
    assert sorted(p.suffix for p in Path(resumed.uri).iterdir()) == [".json"] + [".tar"] * len(jobs)


def test_bad_images_are_left_out_with_their_reasons(tmp_path):
    source = put_folders(tmp_path / "pets")
    (source / "cat" / "000.jpg").write_bytes(b"not an image")
    (source / "cat" / "001.jpg").write_bytes(picture(1)[:-80])
    (source / "dog" / "000.jpg").write_bytes(b"")
    index = ensure(str(source), str(tmp_path / "out"))
    assert sum(split.num_samples for split in index.splits.values()) == 33
    assert index.provenance["left_out"] == {"not an image": 2, "truncated image": 1}
    text = "\n".join(summary(index))
    assert "left out: 2 × not an image" in text
    assert "cat/000.jpg: not an image" in text


def test_too_many_bad_images_are_an_error_that_names_one(tmp_path):
    source = put_folders(tmp_path / "pets")
    for i in range(9):
        (source / "cat" / f"{i:03d}.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"9 of 36 images .* budget is 8; the first is cat/000\.jpg \(not an image\)"):
        ensure(str(source), str(tmp_path / "out"))
    assert ensure(str(source), str(tmp_path / "out"), max_skipped=9).splits["train"].samples_per_class[0] < 4


def test_a_name_with_any_characters_becomes_a_folder(tmp_path):
    source = put_folders(tmp_path / "my pets (größer)")
    index = ensure(str(source), str(tmp_path / "out"))
    assert index.name == "my pets (größer)"
    assert Path(index.uri).name.startswith("my_pets_gr_er_-")
    assert DatasetIndex.load(index.uri) == index


def test_images_stored_at_model_size_are_what_the_model_would_have_made(tmp_path):
    from torchvision import transforms

    clip = transforms.Compose([transforms.Resize(16, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(16)])

    def pixels(image: Image.Image) -> torch.Tensor:
        return transforms.functional.pil_to_tensor(clip(image)).float()

    source = str(put_folders(tmp_path / "pets"))
    kept, stored, jpeg = (
        ensure(source, str(tmp_path / "out"), **options)
        for options in ({}, {"resize_px": 16}, {"resize_px": 16, "image_format": "jpeg"})
    )
    for a, b, c in zip(
        *(eval_batches(i, "test", batch_size=99, transform=pixels) for i in (kept, stored, jpeg)), strict=True
    ):
        assert a.keys == b.keys == c.keys
        assert torch.equal(a.images, b.images)
        assert 0 < (a.images - c.images).abs().mean() < 6
    assert Image.open(io.BytesIO(contents(stored)["train"][0][1])).size == (16, 16)


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"shots": 0}, "shots is 0"), ({"resize_px": 2}, "resize_px is 2"), ({"image_format": "gif"}, "'gif'")],
)
def test_bad_settings_are_explained(bad, message):
    with pytest.raises(DataError, match=message):
        Settings(**bad)


# --- what is prepared already ----------------------------------------------------------------------------------------


def test_a_prepared_folder_is_used_as_it_is(tmp_path):
    index = ensure(str(put_folders(tmp_path / "pets")), str(tmp_path / "out"))
    assert ensure(index.uri, "nowhere") == index
    renamed = ensure(index.uri, "nowhere", name="other", template="the {}.")
    assert (renamed.name, renamed.templates, renamed.splits) == ("other", ("the {}.",), index.splits)
    with pytest.raises(DataError, match="already prepared: draw 3 shots"):
        ensure(index.uri, "nowhere", shots=3)


def test_a_damaged_prepared_folder_is_not_guessed_around(tmp_path):
    index = ensure(str(put_folders(tmp_path / "pets")), str(tmp_path / "out"))
    path = Path(index.uri, "index.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "x"}))
    with pytest.raises(DataError, match="checksum"):
        ensure(index.uri, "nowhere")


def test_a_pipe_is_not_a_source(tmp_path):
    with pytest.raises(DataError, match="nothing else is opened"):
        ensure(f"pipe:touch {tmp_path}/it-ran", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_an_embedded_task_is_prepared_and_streams(tmp_path):
    index = ensure("embedded:digits", str(tmp_path), shots=2)
    assert index.splits["train"].samples_per_class == (2,) * 10
    assert index.splits["test"].num_samples == 697
    assert index.provenance["source"] == "embedded:digits"

    def transform(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()

    def never(*_):
        raise AssertionError("drawn again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "samples", never)
        embedded._drawn.cache_clear()
        assert ensure("embedded:digits", str(tmp_path), shots=2) == index

    with pytest.raises(DataError, match="the transform gave"):
        list(TrainStream(index, "train", seed=0, batch_size=8, transform=transform).epoch(0))
    small = TrainStream(index, "train", seed=0, batch_size=8, transform=lambda im: transform(im.resize((16, 16))))
    assert sum(len(batch.keys) for batch in small.epoch(0)) == 20


def test_known_sizes_that_differ_are_reported(tmp_path):
    rows = {s: [[f"{s}{c}.jpg", c, f"n{c}"] for c in range(10)] for s in ("train", "val", "test")}
    for split_rows in rows.values():
        for ref, label, _ in split_rows:
            (tmp_path / "eurosat" / "2750").mkdir(parents=True, exist_ok=True)
            (tmp_path / "eurosat" / "2750" / ref).write_bytes(picture(label))
    (tmp_path / "eurosat" / "split_zhou_EuroSAT.json").write_text(json.dumps(rows))
    index = ensure(str(tmp_path / "eurosat"), str(tmp_path / "out"))
    assert index.split_protocol == "coop"
    assert index.provenance["sizes_that_differ"]["train"] == {"found": 10, "published": 13500}
    assert "train has 10 images, the published split 13,500" in "\n".join(summary(index))


def test_a_job_can_run_in_another_process(tmp_path):
    import pickle

    jobs = plan(str(put_folders(tmp_path / "pets")), str(tmp_path / "out")).jobs
    result = pickle.loads(pickle.dumps(write_job(pickle.loads(pickle.dumps(jobs[0])))))
    assert result.shard is not None
    assert result.shard.num_samples == len(jobs[0].items)


# --- a data set by its name ------------------------------------------------------------------------------------------


def test_a_name_finds_the_only_prepared_data_set_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(put_folders(tmp_path / "pets"))
    root = str(tmp_path / "prepared")
    index = ensure(source, root)
    assert ensure(f"{root}/pets", root) == index
    assert f"{root}/pets-{index.provenance['digest'][:8]}" == index.uri
    monkeypatch.chdir(root)
    assert ensure("pets", root).digest() == index.digest()
    (tmp_path / "prepared" / "pets-00000000").mkdir()  # without an index: it was never finished
    assert ensure(f"{root}/pets", root) == index
    other = ensure(source, root, shots=2)
    with pytest.raises(DataError, match=r"may be any of .*pets-.*pets-.* with its digest") as error:
        ensure(f"{root}/pets", root)
    assert all(found.uri in str(error.value) for found in (index, other))
    assert ensure(index.uri, root) == index  # in full it is no question
    with pytest.raises(DataError, match="there is no data set at"):
        ensure(f"{root}/pet", root)


def test_a_folder_of_the_name_itself_comes_first(tmp_path: Path) -> None:
    root = tmp_path / "all"
    index = ensure(str(put_folders(tmp_path / "pets")), str(root))
    put_folders(root / "pets", classes=("a", "b"))
    assert ensure(f"{root}/pets", str(root)).class_names == ("a", "b")
    assert ensure(index.uri, str(root)) == index
