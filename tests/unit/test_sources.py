"""Every layout people have is recognised for what it is, and what is missing from it is said."""

import csv
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from source_files import all_read, jpeg, put, sizes

from diki_ray.data.sources import open_source
from diki_ray.data.sources.arrays import read_idx
from diki_ray.errors import DataError

SHARED_DATA = Path(os.environ.get("DIKI_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


# --- folders and manifests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "class_name"),
    [
        ("red_fox", "red fox"),
        ("RedFox", "Red Fox"),
        ("redFox", "red Fox"),
        ("AnnualCrop", "Annual Crop"),
        ("TVset", "TVset"),
        ("MIT_TechSquare", "MIT TechSquare"),
        ("T-Shirt", "T-Shirt"),
        ("B707", "B707"),
    ],
)
def test_a_class_folders_name_becomes_words(tmp_path, folder, class_name):
    for i in range(3):
        put(tmp_path / folder / f"{i}.jpg", jpeg(i))
        put(tmp_path / "zebra" / f"{i}.jpg", jpeg(i))
    assert open_source(str(tmp_path)).class_names == (class_name, "zebra")


def test_class_folders_without_split_folders(tmp_path):
    for i in range(3):
        put(tmp_path / "my set" / "big_cat" / f"{i}.JPG", jpeg(i))
        put(tmp_path / "my set" / "dog" / "deep" / f"{i}.jpeg", jpeg(i))
    put(tmp_path / "my set" / "stray.jpg", jpeg())
    put(tmp_path / "my set" / "dog" / "notes.txt")
    put(tmp_path / "my set" / ".cache" / "x.jpg")
    put(tmp_path / "my set" / "dog" / os.fsdecode(b"\xff.jpg"), jpeg())
    (tmp_path / "my set" / "empty").mkdir()
    raw = open_source(str(tmp_path / "my set"))
    assert (raw.name, raw.layout, raw.class_names) == ("my set", "class folders", ("big cat", "dog"))
    assert sizes(raw) == {"train": 6}
    assert raw.skipped == {"image without a class": 1, "not an image file": 1, "file name is not UTF-8": 1}
    assert raw.notes == ("folders without an image are not classes: empty",)
    all_read(raw)


def test_class_folders_in_split_folders(tmp_path):
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        for i in range(count):
            put(tmp_path / split / "a" / f"{i}.jpg", jpeg(i))
    put(tmp_path / "test" / "only_here" / "0.jpg", jpeg())
    put(tmp_path / "LICENSE")
    raw = open_source(str(tmp_path), name="mine")
    assert (raw.name, raw.layout) == ("mine", "class folders in split folders")
    assert raw.class_names == ("a", "only here")
    assert sizes(raw) == {"train": 3, "val": 2, "test": 2}
    all_read(raw)


def test_train_and_val_folders_alone_are_train_and_test(tmp_path):
    for split in ("train", "val"):
        put(tmp_path / split / "a" / "0.jpg", jpeg())
    raw = open_source(str(tmp_path))
    assert sizes(raw) == {"train": 1, "test": 1}
    assert "used as test set" in raw.notes[0]


def test_two_folders_for_one_split_are_refused(tmp_path):
    for split in ("train", "val", "validation"):
        put(tmp_path / split / "a" / "0.jpg", jpeg())
    with pytest.raises(DataError, match="both 'val' and 'validation'"):
        open_source(str(tmp_path))


def test_a_prepared_data_set_is_not_a_source(tmp_path):
    put(tmp_path / "index.json", "{}")
    with pytest.raises(DataError, match="prepared data set already"):
        open_source(str(tmp_path))


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(DataError, match="no data set at"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no images in class folders"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="not a known data set"):
        open_source(str(tmp_path), split_protocol="coop")


ROWS = [
    {"path": "images/1.jpg", "label": "cat", "split": "train"},
    {"path": "images/2.jpg", "label": "wild_dog", "split": "test"},
    {"path": "images/3.jpg", "label": "cat", "split": "valid"},
    {"path": "images/none.jpg", "label": "cat", "split": "train"},
    {"path": "images/4.jpg", "label": "", "split": "train"},
]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_manifest(tmp_path, kind):
    for i in range(1, 5):
        put(tmp_path / "images" / f"{i}.jpg", jpeg(i))
    manifest = tmp_path / f"manifest.{kind}"
    if kind == "csv":
        with manifest.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["path", "label", "split"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        manifest.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for source in (manifest, tmp_path):
        raw = open_source(str(source))
        assert (raw.layout, raw.class_names) == ("manifest", ("cat", "wild dog"))
        assert sizes(raw) == {"train": 1, "test": 1, "val": 1}
        assert raw.skipped == {"file missing": 1, "image without a class": 1}
        all_read(raw)


def test_a_manifest_may_number_its_classes(tmp_path):
    put(tmp_path / "1.jpg", jpeg())
    manifest = put(tmp_path / "m.csv", "file_name,label\n1.jpg,1\n")
    raw = open_source(str(manifest), class_names=("cat", "dog"))
    assert raw.class_names == ("cat", "dog")
    assert raw.splits["train"][0].label == 1
    with pytest.raises(DataError, match="neither class names nor numbers below 1"):
        open_source(str(manifest), class_names=("cat",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "no path"),
        ("path,label\n", "no labelled image"),
        ("path,label\n../../etc/passwd,cat\n", "leaves the data set's folder"),
        ("path,label\n/etc/passwd,cat\n", "leaves the data set's folder"),
        ("path,label,split\na.jpg,cat,holdout\n", "split 'holdout'"),
    ],
)
def test_a_bad_manifest_is_explained(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        open_source(str(put(tmp_path / "m.csv", content)))


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[1, 2]\n", b"3\n"])
def test_a_garbled_manifest_is_a_data_error(tmp_path, content):
    with pytest.raises(DataError):
        open_source(str(put(tmp_path / "m.jsonl", content)))


# --- arrays ----------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def put_idx(folder: Path, num_train: int = 20, zipped: bool = False) -> None:
    for stem, count in (("train", num_train), ("t10k", 10)):
        images = np.random.default_rng(count).integers(0, 255, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for part, array in (("images-idx3", images), ("labels-idx1", labels)):
            data = idx(array)
            put(
                folder / f"{stem}-{part}-ubyte{'.gz' if zipped else ''}",
                gzip.compress(data, mtime=0) if zipped else data,
            )


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files(tmp_path, zipped):
    put_idx(tmp_path / "mnist", zipped=zipped)
    raw = open_source(str(tmp_path / "mnist"))
    assert (raw.name, raw.split_protocol, raw.layout) == ("MNIST", "coop", "idx")
    assert raw.class_names[7] == "7 - seven"
    assert raw.templates == ('a photo of the number: "{}".',)
    assert sizes(raw) == {"train": 20, "test": 10}
    data, extension = raw.reader.read("train/000003")
    expected = np.random.default_rng(20).integers(0, 255, (20, 28, 28), dtype=np.uint8)[3]
    assert extension == "png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), expected)


def test_idx_files_of_an_unknown_set_have_numbers_for_names(tmp_path):
    put_idx(tmp_path / "letters")
    raw = open_source(str(tmp_path / "letters"))
    assert (raw.name, raw.split_protocol, raw.class_names) == ("letters", "own", tuple("0123456789"))
    assert "give class_names" in raw.notes[0]
    assert open_source(str(tmp_path / "letters"), class_names=tuple("abcdefghij")).class_names[0] == "a"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0",
        idx(np.zeros((2, 3, 3), np.uint8))[:-1],
        idx(np.zeros((2, 3, 3), np.uint8)) + b"x",
        idx(np.zeros(4, np.uint8)),
        struct.pack(">4I", 0x0D03, 1, 1, 1) + b"x",
        struct.pack(">4I", 0x0803, 2**32 - 1, 2**32 - 1, 2**32 - 1),
    ],
)
def test_a_file_that_is_not_idx_is_refused(tmp_path, content):
    with pytest.raises(DataError):
        read_idx(put(tmp_path / "x", content), 3)


def put_cifar(folder: Path, protocol: int = 2) -> None:
    for name, count in (("train", 200), ("test", 100)):
        data = np.random.default_rng(count).integers(0, 255, (count, 3072), dtype=np.uint8)
        labels = [i % 100 for i in range(count)]
        content = {b"data": data, b"fine_labels": labels, b"coarse_labels": labels, b"filenames": [b"x"] * count}
        put(folder / name, pickle.dumps(content, protocol))
    put(folder / "meta", pickle.dumps({"fine_label_names": [f"class_{i}" for i in range(100)]}, protocol))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar_pickles(tmp_path, protocol):
    put_cifar(tmp_path / "cifar100", protocol)
    raw = open_source(str(tmp_path / "cifar100"))
    assert (raw.name, raw.split_protocol, raw.class_names[:2]) == ("CIFAR100", "coop", ("class 0", "class 1"))
    assert sizes(raw) == {"train": 200, "test": 100}
    pixels = np.asarray(Image.open(io.BytesIO(raw.reader.read("test/000042")[0])))
    expected = np.random.default_rng(100).integers(0, 255, (100, 3072), dtype=np.uint8)[42]
    assert np.array_equal(pixels, expected.reshape(3, 32, 32).transpose(1, 2, 0))
    zscl = open_source(str(tmp_path / "cifar100"), split_protocol="zscl")
    assert len(zscl.templates) == 18


class Touch:
    def __init__(self, target: Path, function) -> None:
        self.target, self.function = target, function

    def __reduce__(self):
        return self.function, (str(self.target),)


@pytest.mark.parametrize("function", [os.mkdir, open, eval, os.system, np.load])
def test_a_malicious_cifar_pickle_never_runs(tmp_path, function):
    put_cifar(tmp_path / "cifar100")
    target = tmp_path / "it-ran"
    put(tmp_path / "cifar100" / "train", pickle.dumps({"data": Touch(target, function), "fine_labels": []}))
    with pytest.raises(DataError, match="not opened"):
        open_source(str(tmp_path / "cifar100"))
    assert not target.exists()


@pytest.mark.parametrize(
    "content", [b"", b"junk", pickle.dumps([1]), pickle.dumps({"data": 3}), pickle.dumps({"data": np.zeros((2, 5))})]
)
def test_a_cifar_file_that_is_none_is_refused(tmp_path, content):
    put_cifar(tmp_path / "cifar100")
    put(tmp_path / "cifar100" / "train", content)
    with pytest.raises(DataError):
        open_source(str(tmp_path / "cifar100"))


# --- embedded and saved sets -----------------------------------------------------------------------------------------


def test_an_embedded_task(tmp_path):
    raw = open_source("embedded:digits")
    assert (raw.name, raw.split_protocol, len(raw.class_names)) == ("digits", "embedded", 10)
    assert set(raw.splits) == {"train", "val", "test"}
    data, extension = raw.reader.read(raw.splits["val"][0].ref)
    assert extension == "png"
    assert Image.open(io.BytesIO(data)).mode == "RGB"
    with pytest.raises(DataError, match="there is no embedded task 'nothing'; there are"):
        open_source("embedded:nothing")


def put_saved(folder: Path, images: list[bytes | None], labels: list[int]) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"image": [{"bytes": b, "path": None} for b in images], "label": labels})
    folder.mkdir(parents=True)
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as w:
        w.write_table(table, max_chunksize=2)
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "big_dog"], "_type": "ClassLabel"}}
    put(folder / "dataset_info.json", json.dumps({"features": features}))
    put(folder / "state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


def test_a_saved_hugging_face_data_set(tmp_path):
    put(tmp_path / "dataset_dict.json", json.dumps({"splits": ["train", "validation"]}))
    put_saved(tmp_path / "train", [jpeg(i) for i in range(5)], [0, 1, 0, -1, 1])
    put_saved(tmp_path / "validation", [jpeg(i) for i in range(2)], [0, 1])
    raw = open_source(str(tmp_path), name="saved")
    assert (raw.class_names, sizes(raw)) == (("cat", "big dog"), {"train": 4, "test": 2})
    assert raw.reader.read(raw.splits["train"][3].ref) == (jpeg(4), "jpg")
    all_read(raw)


def test_a_saved_set_that_refers_to_files_elsewhere_is_refused_image_by_image(tmp_path):
    put_saved(tmp_path / "x", [jpeg(), None], [0, 1])
    raw = open_source(str(tmp_path / "x"))
    with pytest.raises(DataError, match="outside the data set"):
        raw.reader.read(raw.splits["train"][1].ref)


# --- real images -----------------------------------------------------------------------------------------------------

REAL = {
    "caltech-101": ("Caltech101", "coop", 100, {"train": 1400, "val": 600, "test": 800}),
    "eurosat": ("EuroSAT", "coop", 10, {"train": 1500, "val": 600, "test": 900}),
    "oxford_flowers": ("Flowers", "coop", 102, {"train": 1224, "val": 510, "test": 714}),
    "mnist": ("MNIST", "coop", 10, {"train": 6000, "test": 1200}),
    "fashion-mnist": ("FashionMNIST", "own", 10, {"train": 6000, "test": 1200}),
    "clothing": ("clothing", "own", 10, {"train": 3068, "val": 341, "test": 372}),
    "scenes15": ("scenes15", "own", 15, {"train": 840, "test": 600}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data_sets_are_recognised(name, tmp_path):
    if not (SHARED_DATA / f"{name}.tar").is_file():
        message = f"no {name}.tar in {SHARED_DATA} (set DIKI_SHARED_DATA): this layout was not tried on real images"
        warnings.warn(message, stacklevel=1)  # a skip is easily overlooked
        pytest.skip(message)
    with tarfile.open(SHARED_DATA / f"{name}.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    raw = open_source(str(tmp_path / name))
    assert (raw.name, raw.split_protocol, len(raw.class_names), sizes(raw)) == REAL[name]
    assert raw.skipped.get("file missing", 0) == 0
