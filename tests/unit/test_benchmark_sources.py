"""The benchmarks' data sets in the layouts of CoOp and of torchvision, and the splits of both protocols."""

import json
import os
from pathlib import Path

import pytest
from source_files import all_read, jpeg, put, sizes

from diki_ray.config.protocols import catalogue
from diki_ray.data.sources import benchmark_folder, benchmark_folders, open_source
from diki_ray.data.sources.fabrication import fabricate
from diki_ray.errors import DataError

SHARED_DATA = Path(os.environ.get("DIKI_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


# --- benchmarks: coop ------------------------------------------------------------------------------------------------


def test_a_coop_split_file(tmp_path):
    folder = fabricate("Caltech101", "coop", tmp_path).rename(tmp_path / "whatever")
    (folder / "101_ObjectCategories" / "Caltech101_0" / "train_0_0.jpg").unlink()
    raw = open_source(str(folder))
    assert (raw.name, raw.split_protocol, raw.layout) == ("Caltech101", "coop", "CoOp split file")
    assert raw.class_names[5] == "Caltech101 5"
    assert raw.templates == ("a photo of a {}.",)
    assert sizes(raw) == {"train": 199, "val": 100, "test": 100}
    assert raw.skipped == {"file missing": 1}
    all_read(raw)


def test_part_of_a_known_set_is_not_called_the_benchmark(tmp_path):
    split_file = fabricate("EuroSAT", "coop", tmp_path) / "split_zhou_EuroSAT.json"
    rows = json.loads(split_file.read_text())
    split_file.write_text(json.dumps({s: [row for row in rows[s] if row[1] < 3] for s in rows}))
    raw = open_source(str(split_file.parent))
    assert (raw.split_protocol, raw.known_sizes) == ("own", {})
    assert "not comparable" in raw.notes[-1]
    with pytest.raises(DataError, match="3 classes where EuroSAT has 10"):
        open_source(str(split_file.parent), split_protocol="coop")


def test_a_missing_split_file_says_where_to_get_it(tmp_path):
    put(tmp_path / "dtd" / "images" / "banded" / "1.jpg", jpeg())
    with pytest.raises(DataError, match=r"split_zhou_DescribableTextures.*CoOp's repository"):
        open_source(str(tmp_path / "dtd"), split_protocol="coop")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": []}, "not a split file"),
        ({"train": [["a.jpg", 0]], "val": [], "test": []}, "not a split file"),
        ({"train": [["a.jpg", 0, "x"], ["b.jpg", 0, "y"]], "val": [], "test": []}, "label 0 is 'x'"),
        ({"train": [["a.jpg", 1, "x"]], "val": [], "test": []}, "without gaps"),
        ({"train": [["../a.jpg", 0, "x"]], "val": [], "test": []}, "leaves the data set's folder"),
    ],
)
def test_a_bad_split_file_is_explained(tmp_path, content, message):
    put(tmp_path / "split_zhou_EuroSAT.json", json.dumps(content))
    (tmp_path / "2750").mkdir()
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path), split_protocol="coop")


def test_aircraft_lists(tmp_path):
    """As CoOp has people rename the folder, and as it is in the archive."""
    for split in ("coop", "zscl"):
        raw = open_source(str(fabricate("Aircraft", split, tmp_path)))
        assert (raw.name, raw.split_protocol) == ("Aircraft", "coop")
        assert sizes(raw) == {"train": 200, "val": 100, "test": 100}
        assert raw.class_names[99] == "Aircraft 99"
    put(tmp_path / "fgvc_aircraft" / "images_variant_val.txt", "0001 Zeppelin\n")
    with pytest.raises(DataError, match="names no variant"):
        open_source(str(tmp_path / "fgvc_aircraft"))


# --- benchmarks: zscl ------------------------------------------------------------------------------------------------


def test_caltech101_for_the_zscl_protocol_from_coops_folder(tmp_path):
    folder = fabricate("Caltech101", "zscl", tmp_path)
    put(folder / "101_ObjectCategories" / "BACKGROUND_Google" / "tmp.jpg", jpeg())
    raw = open_source(str(folder), split_protocol="zscl")
    assert sizes(raw) == {"train": 323, "test": 81}
    assert (raw.class_names[0], raw.class_names[100], len(raw.templates)) == (
        "off-center face",
        "yin and yang symbol",
        34,
    )
    # As torch.utils.data.random_split cuts it, which is what ZSCL's code calls.
    import torch

    everything = sorted(i.ref for items in raw.splits.values() for i in items)
    train, _ = torch.utils.data.random_split(everything, [323, 81], torch.Generator().manual_seed(42))
    assert [i.ref for i in raw.splits["train"]] == list(train)


def test_flowers_for_the_zscl_protocol(tmp_path):
    folder = fabricate("Flowers", "zscl", tmp_path)
    raw = open_source(str(folder), split_protocol="zscl")
    assert sizes(raw) == {"train": 204, "test": 102}
    assert [raw.class_names[i.label] for i in raw.splits["test"]][:2] == ["pink primrose", "hard-leaved pocket orchid"]
    (folder / "setid.mat").unlink()
    with pytest.raises(DataError, match=r"no setid\.mat"):
        open_source(str(folder), split_protocol="zscl")


@pytest.mark.parametrize(
    ("name", "folder", "num_train", "num_test", "a_class"),
    [
        ("DTD", "dtd", 94, 47, "DTD 0"),
        ("Food", "food-101", 202, 101, "Food 0"),
        ("OxfordPets", "oxford-iiit-pet", 74, 37, "Oxfordpets 0"),
        ("StanfordCars", "stanford_cars", 392, 196, "StanfordCars 0"),
        ("SUN397", "SUN397", 1270, 318, "SUN397 1/outdoor"),
        ("Aircraft", "fgvc-aircraft-2013b", 200, 100, "Aircraft 0"),
    ],
)
def test_torchvisions_sets_for_the_zscl_protocol(tmp_path, name, folder, num_train, num_test, a_class):
    assert fabricate(name, "zscl", tmp_path) == tmp_path / folder
    raw = open_source(str(tmp_path / folder), split_protocol="zscl")
    assert (raw.name, raw.split_protocol) == (name, "zscl")
    assert sizes(raw) == {"train": num_train, "test": num_test}
    assert a_class in raw.class_names
    assert raw.templates == catalogue()[name].variants["zscl"].templates
    all_read(raw)


def test_what_torchvision_misses_is_said(tmp_path):
    (tmp_path / "food-101").mkdir()
    with pytest.raises(DataError, match=r"torchvision\.datasets\.Food101 wants it"):
        open_source(str(tmp_path / "food-101"), split_protocol="zscl")


def test_the_folder_of_a_benchmark_is_found_by_any_of_its_names(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    assert benchmark_folder("CIFAR100", str(tmp_path)) == str(tmp_path / "cifar-100-python")
    with pytest.raises(DataError, match="fgvc_aircraft"):
        benchmark_folder("Aircraft", str(tmp_path))


def test_one_folder_holds_both_layouts(tmp_path):
    for split in ("coop", "zscl"):
        fabricate("Aircraft", split, tmp_path)
    assert Path(benchmark_folder("Aircraft", str(tmp_path), "coop")).name == "fgvc_aircraft"
    zscl = benchmark_folder("Aircraft", str(tmp_path), "zscl")
    assert Path(zscl).name == "fgvc-aircraft-2013b"
    assert sizes(open_source(zscl, split_protocol="zscl")) == {"train": 200, "test": 100}


def test_every_missing_set_is_named_and_a_missing_folder_is_called_that(tmp_path, monkeypatch):
    (tmp_path / "dtd").mkdir()
    with pytest.raises(DataError, match=r"(?s)folder of MNIST.*folder of Food"):
        benchmark_folders(["MNIST", "DTD", "Food"], str(tmp_path))
    with pytest.raises(DataError, match=r"there is no folder .*nowhere") as error:
        benchmark_folders(["MNIST", "DTD"], str(tmp_path / "nowhere"))
    assert str(error.value).count("there is no folder") == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    assert benchmark_folders(["DTD"], "~") == [str(tmp_path / "dtd")]


def test_what_is_missing_does_not_ask_for_a_download(tmp_path):
    (tmp_path / "food-101").mkdir()
    with pytest.raises(DataError) as error:
        open_source(str(tmp_path / "food-101"), split_protocol="zscl")
    assert "download=True" not in str(error.value)


def test_eurosat_as_it_is_downloaded_today(tmp_path):
    for folder in ("EuroSAT_RGB", "in/eurosat/EuroSAT_RGB"):
        for c in ("AnnualCrop", *(f"C{i}" for i in range(9))):
            for i in range(5):
                put(tmp_path / folder / c / f"{c}_{i}.jpg", jpeg(i))
    for folder in ("EuroSAT_RGB", "in/eurosat"):
        raw = open_source(str(tmp_path / folder), split_protocol="zscl")
        assert sizes(raw) == {"train": 40, "test": 10}
        all_read(raw)


@pytest.mark.parametrize(("name", "within"), [("Caltech101", "caltech-101"), ("Food", "food-101")])
def test_images_a_folder_deeper_as_todays_archives_unpack(tmp_path, name, within):
    folder = fabricate(name, "coop", tmp_path)
    images = next(path for path in folder.iterdir() if path.is_dir())
    (folder / within).mkdir()
    images.rename(folder / within / images.name)
    raw = open_source(str(folder), split_protocol="coop")
    assert (sizes(raw)["test"], raw.skipped) == (len(raw.class_names), {})
    all_read(raw)


def test_folders_that_repeat_their_name_as_todays_archive_of_cars_does(tmp_path):
    rows = {s: [[f"cars_{s}/{i:05d}.jpg", i, f"car {i}"] for i in range(196)] for s in ("train", "test")}
    put(tmp_path / "stanford_cars/split_zhou_StanfordCars.json", json.dumps(rows | {"val": []}))
    for split in rows:
        for i in range(196):
            put(tmp_path / f"stanford_cars/cars_{split}/cars_{split}/{i:05d}.jpg", jpeg(i))
    raw = open_source(str(tmp_path / "stanford_cars"), split_protocol="coop")
    assert (sizes(raw), raw.skipped) == ({"train": 196, "val": 0, "test": 196}, {})
    all_read(raw)
