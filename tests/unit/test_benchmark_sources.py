"""The benchmarks' data sets in the layouts of CoOp and of torchvision, and the splits of both protocols."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from source_files import all_read, jpeg, put, sizes

from diki_ray.config.protocols import catalogue
from diki_ray.data.sources import benchmark_folder, benchmark_folders, open_source
from diki_ray.errors import DataError

SHARED_DATA = Path(os.environ.get("DIKI_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


# --- benchmarks: coop ------------------------------------------------------------------------------------------------


def put_coop(folder: Path, split_file: str, image_folder: str, num_classes: int = 100) -> None:
    rows: dict[str, list] = {"train": [], "val": [], "test": []}
    for label in range(num_classes):
        for split in rows:
            path = f"c{label}/{split}.jpg"
            put(folder / image_folder / path, jpeg(label))
            rows[split].append([path, label, f"name_{label}"])
    put(folder / split_file, json.dumps(rows))


def test_a_coop_split_file(tmp_path):
    put_coop(tmp_path / "whatever", "split_zhou_Caltech101.json", "101_ObjectCategories")
    (tmp_path / "whatever" / "101_ObjectCategories" / "c0" / "train.jpg").unlink()
    raw = open_source(str(tmp_path / "whatever"))
    assert (raw.name, raw.split_protocol, raw.layout) == ("Caltech101", "coop", "CoOp split file")
    assert raw.class_names[5] == "name 5"
    assert raw.templates == ("a photo of a {}.",)
    assert sizes(raw) == {"train": 99, "val": 100, "test": 100}
    assert raw.skipped == {"file missing": 1}
    all_read(raw)


def test_part_of_a_known_set_is_not_called_the_benchmark(tmp_path):
    put_coop(tmp_path / "x", "split_zhou_Caltech101.json", "101_ObjectCategories", num_classes=3)
    raw = open_source(str(tmp_path / "x"))
    assert (raw.split_protocol, raw.known_sizes) == ("own", {})
    assert "not comparable" in raw.notes[-1]
    with pytest.raises(DataError, match="3 classes where Caltech101 has 100"):
        open_source(str(tmp_path / "x"), split_protocol="coop")


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
    for base in (tmp_path / "fgvc_aircraft", tmp_path / "fgvc-aircraft-2013b" / "data"):
        names = [f"Model {i}" for i in range(100)]
        put(base / "variants.txt", "\n".join(names) + "\n")
        for n, split in enumerate(("train", "val", "test")):
            put(base / f"images_variant_{split}.txt", "".join(f"{n}{i:03d} {names[i]}\n" for i in range(100)))
            for i in range(100):
                put(base / "images" / f"{n}{i:03d}.jpg", jpeg(i))
    for folder in ("fgvc_aircraft", "fgvc-aircraft-2013b"):
        raw = open_source(str(tmp_path / folder))
        assert (raw.name, raw.split_protocol, sizes(raw)) == (
            "Aircraft",
            "coop",
            {"train": 100, "val": 100, "test": 100},
        )
        assert raw.class_names[99] == "Model 99"
    put(tmp_path / "fgvc_aircraft" / "images_variant_val.txt", "0001 Zeppelin\n")
    with pytest.raises(DataError, match="names no variant"):
        open_source(str(tmp_path / "fgvc_aircraft"))


# --- benchmarks: zscl ------------------------------------------------------------------------------------------------


def test_caltech101_for_the_zscl_protocol_from_coops_folder(tmp_path):
    images = tmp_path / "caltech-101" / "101_ObjectCategories"
    for i in range(101):
        for k in range(2):
            put(images / f"c{i:03d}" / f"image_{k}.jpg", jpeg(i))
    put(images / "BACKGROUND_Google" / "tmp.jpg", jpeg())
    raw = open_source(str(tmp_path / "caltech-101"), split_protocol="zscl")
    assert sizes(raw) == {"train": 161, "test": 41}
    assert (raw.class_names[0], raw.class_names[100], len(raw.templates)) == (
        "off-center face",
        "yin and yang symbol",
        34,
    )
    # As torch.utils.data.random_split cuts it, which is what ZSCL's code calls.
    import torch

    everything = sorted(i.ref for items in raw.splits.values() for i in items)
    train, _ = torch.utils.data.random_split(everything, [161, 41], torch.Generator().manual_seed(42))
    assert [i.ref for i in raw.splits["train"]] == list(train)


def test_flowers_for_the_zscl_protocol(tmp_path):
    folder = tmp_path / "oxford_flowers"
    for i in range(1, 205):
        put(folder / "jpg" / f"image_{i:05d}.jpg", jpeg(i))
    with pytest.raises(DataError, match=r"no setid\.mat"):
        open_source(str(folder), split_protocol="zscl")
    savemat(folder / "imagelabels.mat", {"labels": np.arange(204) % 102 + 1})
    savemat(folder / "setid.mat", {"trnid": np.arange(1, 103), "valid": np.arange(1, 3), "tstid": np.arange(103, 205)})
    raw = open_source(str(folder), split_protocol="zscl")
    assert sizes(raw) == {"train": 102, "test": 102}
    assert [raw.class_names[i.label] for i in raw.splits["test"]][:2] == ["pink primrose", "hard-leaved pocket orchid"]


def put_torchvision(name: str, root: Path) -> None:
    if name == "DTD":
        classes = [f"t_{i:02d}" for i in range(47)]
        for split in ("train", "val", "test"):
            put(root / "dtd/dtd/labels" / f"{split}1.txt", "".join(f"{c}/{c}_{split}.jpg\n" for c in classes))
            for c in classes:
                put(root / "dtd/dtd/images" / c / f"{c}_{split}.jpg", jpeg())
    elif name == "Food":
        for split in ("train", "test"):
            content = {f"f_{i:03d}": [f"f_{i:03d}/{split}"] for i in range(101)}
            put(root / "food-101/meta" / f"{split}.json", json.dumps(content))
            for paths in content.values():
                put(root / "food-101/images" / f"{paths[0]}.jpg", jpeg())
    elif name == "OxfordPets":
        for split in ("trainval", "test"):
            lines = [f"pet_{i:02d}_{split} {i + 1} 1 1" for i in range(37)]
            put(root / "oxford-iiit-pet/annotations" / f"{split}.txt", "\n".join(lines) + "\n")
            for line in lines:
                put(root / "oxford-iiit-pet/images" / f"{line.split()[0]}.jpg", jpeg())
    elif name == "StanfordCars":
        base = root / "stanford_cars"
        (base / "devkit").mkdir(parents=True)
        names = np.array([f"Car {i} 2012" for i in range(196)], dtype=object)
        savemat(base / "devkit/cars_meta.mat", {"class_names": names})
        for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
            rows = np.array(
                [(f"{i:05d}.jpg", i + 1) for i in range(196)], dtype=[("fname", object), ("class", np.uint8)]
            )
            savemat(base / file, {"annotations": rows})
            for i in range(196):
                put(base / f"cars_{split}" / f"{i:05d}.jpg", jpeg())
    elif name == "SUN397":
        names = [f"/{'abc'[i % 3]}/place_{i:03d}" for i in range(396)] + ["/c/church/outdoor"]
        put(root / "SUN397/ClassName.txt", "\n".join(names) + "\n")
        for n in names:
            put(root / f"SUN397{n}" / "sun_a.jpg", jpeg())
    elif name == "Aircraft":
        base = root / "fgvc-aircraft-2013b/data"
        put(base / "variants.txt", "".join(f"Model_{i}\n" for i in range(100)))
        for split in ("train", "test"):
            put(base / f"images_variant_{split}.txt", "".join(f"{split}{i} Model_{i}\n" for i in range(100)))
            for i in range(100):
                put(base / "images" / f"{split}{i}.jpg", jpeg())


@pytest.mark.parametrize(
    ("name", "folder", "num_train", "num_test", "a_class"),
    [
        ("DTD", "dtd", 47, 47, "t 00"),
        ("Food", "food-101", 101, 101, "f 000"),
        ("OxfordPets", "oxford-iiit-pet", 37, 37, "Pet 00"),
        ("StanfordCars", "stanford_cars", 196, 196, "Car 0 2012"),
        ("SUN397", "SUN397", 317, 80, "church/outdoor"),
        ("Aircraft", "fgvc-aircraft-2013b", 100, 100, "Model 0"),
    ],
)
def test_torchvisions_sets_for_the_zscl_protocol(tmp_path, name, folder, num_train, num_test, a_class):
    put_torchvision(name, tmp_path)
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
    for i in range(100):
        put(tmp_path / "fgvc_aircraft/images" / f"i{i}.jpg", jpeg())
    put(tmp_path / "fgvc_aircraft/variants.txt", "".join(f"M {i}\n" for i in range(100)))
    put_torchvision("Aircraft", tmp_path)
    assert Path(benchmark_folder("Aircraft", str(tmp_path), "coop")).name == "fgvc_aircraft"
    zscl = benchmark_folder("Aircraft", str(tmp_path), "zscl")
    assert Path(zscl).name == "fgvc-aircraft-2013b"
    assert sizes(open_source(zscl, split_protocol="zscl")) == {"train": 100, "test": 100}


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
