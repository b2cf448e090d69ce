"""The benchmarks' data sets fabricated: every class, a few images of noise, in the layouts in which the real ones come.

For rehearsals (diki_ray/commands/rehearse.py) and for the tests of the readers in `benchmarks.py`. The same call
writes the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diki_ray.config.protocols import Variant, catalogue
from diki_ray.data.sources.benchmarks import TORCHVISION_FOLDERS

IMAGES_PER_CLASS: Mapping[str, int] = {"train": 2, "val": 1, "test": 1}
"""Two to train on, so that validation images can be held out where a source has none."""


def fabricate(name: str, split: str, place: Path) -> Path:
    """Writes a known data set into `place`, laid out for the split "coop" or "zscl"; the folder that it is in."""
    entry = catalogue()[name]
    variant = entry.variants[split]
    folder = place / entry.folders[0]
    if variant.layout == "torchvision":
        folder = place / TORCHVISION_FOLDERS[variant.options["torchvision"]]
    _LAYOUTS[variant.options.get("torchvision", variant.layout)](folder, name, variant)
    return folder


def _write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _noise(seed: str, *shape: int) -> NDArray[np.uint8]:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def _write_image(path: Path) -> None:
    out = io.BytesIO()
    Image.fromarray(_noise(path.name, 12, 16, 3)).save(out, "JPEG")
    _write(path, out.getvalue())


def _class_names(name: str, variant: Variant) -> list[str]:
    return [f"{name}_{label}" for label in range(variant.num_classes)]


def _split_file(folder: Path, name: str, variant: Variant) -> None:
    images = folder / variant.options["image_folders"][0]
    rows: dict[str, list[tuple[str, int, str]]] = {"train": [], "val": [], "test": []}
    for split in rows:
        for label, class_name in enumerate(_class_names(name, variant)):
            for n in range(IMAGES_PER_CLASS[split]):
                path = f"{class_name}/{split}_{label}_{n}.jpg"
                _write_image(images / path)
                rows[split].append((path, label, class_name))
    _write(folder / variant.options["split_file"], json.dumps(rows))


def _variants(folder: Path, name: str, variant: Variant) -> None:
    """FGVC-Aircraft's lists, as they lie in CoOp's folder and in the `data` folder of torchvision's."""
    names = _class_names(name, variant)
    _write(folder / "variants.txt", "".join(f"{class_name}\n" for class_name in names))
    for number, (split, num_images) in enumerate(IMAGES_PER_CLASS.items()):
        rows = [(f"{number}{label:03d}{n}", c) for label, c in enumerate(names) for n in range(num_images)]
        _write(folder / f"images_variant_{split}.txt", "".join(f"{image} {c}\n" for image, c in rows))
        for image, _ in rows:
            _write_image(folder / "images" / f"{image}.jpg")


def _idx(folder: Path, name: str, variant: Variant) -> None:
    for split, stem in (("train", "train"), ("test", "t10k")):
        labels = np.repeat(np.arange(variant.num_classes, dtype=np.uint8), IMAGES_PER_CLASS[split])
        images = _noise(name + stem, len(labels), 28, 28)
        for part, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
            _write(folder / f"{stem}-{part}-ubyte", header + array.tobytes())


def _cifar(folder: Path, name: str, variant: Variant) -> None:
    for split in ("train", "test"):
        labels = [label for label in range(variant.num_classes) for _ in range(IMAGES_PER_CLASS[split])]
        content = {"data": _noise(name + split, len(labels), 3072), "fine_labels": labels}
        _write(folder / split, pickle.dumps(content, 2))
    _write(folder / "meta", pickle.dumps({"fine_label_names": _class_names(name, variant)}, 2))


def _class_folders(folder: Path, name: str, variant: Variant) -> None:
    for class_name in _class_names(name, variant):
        for n in range(sum(IMAGES_PER_CLASS.values())):
            _write_image(folder / variant.options["image_folders"][0] / class_name / f"{class_name}_{n}.jpg")


def _flowers(folder: Path, name: str, variant: Variant) -> None:
    from scipy.io import savemat

    sizes = [variant.num_classes * IMAGES_PER_CLASS[split] for split in ("train", "val", "test")]
    ids = np.split(np.arange(1, sum(sizes) + 1), np.cumsum(sizes)[:-1])
    savemat(_made(folder) / "setid.mat", dict(zip(("trnid", "valid", "tstid"), ids, strict=True)))
    savemat(folder / "imagelabels.mat", {"labels": np.arange(sum(sizes)) % variant.num_classes + 1})
    for number in range(1, sum(sizes) + 1):
        _write_image(folder / variant.options["image_folders"][0] / f"image_{number:05d}.jpg")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _dtd(folder: Path, name: str, variant: Variant) -> None:
    for split, num_images in IMAGES_PER_CLASS.items():
        paths = [f"{c}/{c}_{split}_{n}.jpg" for c in _class_names(name, variant) for n in range(num_images)]
        _write(folder / "dtd/labels" / f"{split}1.txt", "".join(f"{path}\n" for path in paths))
        for path in paths:
            _write_image(folder / "dtd/images" / path)


def _food(folder: Path, name: str, variant: Variant) -> None:
    for split in ("train", "test"):
        names = sorted(_class_names(name, variant))
        images = {c: [f"{c}/{split}_{c}_{n}" for n in range(IMAGES_PER_CLASS[split])] for c in names}
        _write(folder / "meta" / f"{split}.json", json.dumps(images))
        for path in (path for paths in images.values() for path in paths):
            _write_image(folder / "images" / f"{path}.jpg")


def _pets(folder: Path, name: str, variant: Variant) -> None:
    for split, file in (("train", "trainval"), ("test", "test")):
        rows = [
            (f"{class_name}_{split}{n}", label)
            for label, class_name in enumerate(_class_names(name, variant), start=1)
            for n in range(IMAGES_PER_CLASS[split])
        ]
        _write(folder / "annotations" / f"{file}.txt", "".join(f"{image} {label} 1 1\n" for image, label in rows))
        for image, _ in rows:
            _write_image(folder / "images" / f"{image}.jpg")


def _cars(folder: Path, name: str, variant: Variant) -> None:
    from scipy.io import savemat

    _made(folder / "devkit")
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(_class_names(name, variant), dtype=object)})
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        labels = [label for label in range(1, variant.num_classes + 1) for _ in range(IMAGES_PER_CLASS[split])]
        rows = [(f"{n:05d}.jpg", label) for n, label in enumerate(labels)]
        annotations = np.array(rows, dtype=[("fname", object), ("class", np.uint8)])
        savemat(folder / file, {"annotations": annotations})
        for image, _ in rows:
            _write_image(folder / f"cars_{split}" / image)


def _sun(folder: Path, name: str, variant: Variant) -> None:
    names = [f"{c}/outdoor" if label % 2 else c for label, c in enumerate(_class_names(name, variant))]
    places = [f"{'abc'[label % 3]}/{c}" for label, c in enumerate(names)]
    _write(folder / "ClassName.txt", "".join(f"/{place}\n" for place in places))
    for label, place in enumerate(places):
        for n in range(sum(IMAGES_PER_CLASS.values())):
            _write_image(folder / place / f"sun_{label}_{n}.jpg")


_LAYOUTS: Mapping[str, Callable[[Path, str, Variant], None]] = {
    "split_file": _split_file,
    "variants": _variants,
    "idx": _idx,
    "cifar": _cifar,
    "class_folders": _class_folders,
    "flowers_mat": _flowers,
    "DTD": _dtd,
    "FGVCAircraft": lambda folder, name, variant: _variants(folder / "data", name, variant),
    "Food101": _food,
    "OxfordIIITPet": _pets,
    "StanfordCars": _cars,
    "SUN397": _sun,
}
"""The name is that of the reader's layout, or of the class of torchvision that reads it."""
