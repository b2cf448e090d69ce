"""The benchmarks' own files: CoOp's split files, FGVC-Aircraft's lists, the zscl protocol's seeded or own splits."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diki_ray.config.protocols import Variant
from diki_ray.data.sources.arrays import cifar_dataset, cifar_kind, idx_dataset, is_idx
from diki_ray.data.sources.folders import image_files, items_of
from diki_ray.data.sources.raw import FileReader, RawDataset, RawItem, spaced
from diki_ray.errors import DataError
from diki_ray.json_text import parsed
from diki_ray.regular_files import read_regular

ZSCL_SPLIT_SEED = 42
"""With which ZSCL's code cuts 80 % for training where torchvision has no split."""


TORCHVISION_FOLDERS: Mapping[str, str] = {
    "DTD": "dtd",
    "FGVCAircraft": "fgvc-aircraft-2013b",
    "Food101": "food-101",
    "OxfordIIITPet": "oxford-iiit-pet",
    "StanfordCars": "stanford_cars",
    "SUN397": "SUN397",
}
"""Where torchvision's classes keep their files below their root."""


def benchmark_dataset(folder: Path, name: str, variant: Variant) -> RawDataset:
    """A known data set from its folder, by the layout that the catalogue gives; DataError says what is missing."""
    about = {
        "templates": variant.templates,
        "split_protocol": variant.split_protocol,
        "known_sizes": variant.known_sizes,
    }
    return _LAYOUTS[variant.layout](folder, name, variant, about)


def suits(folder: Path, variant: Variant) -> bool:
    """Whether the folder has what decides this variant's splits, by a look at names alone."""
    if variant.layout == "torchvision":
        own = TORCHVISION_FOLDERS[variant.options["torchvision"]]
        return folder.name == own or (folder / own).is_dir()
    wanted = {
        "split_file": [variant.options.get("split_file", "")],
        "flowers_mat": ["setid.mat"],
        "variants": ["variants.txt", "data/variants.txt"],
        "class_folders": variant.options.get("image_folders", []),
    }.get(variant.layout, ["."])
    return any((folder / name).exists() for name in wanted)


def has_split_file(folder: Path) -> bool:
    """Whether one of CoOp's split files lies in the folder."""
    return any(folder.glob("split_zhou_*.json"))


def split_file_dataset(
    folder: Path, name: str, split_file: Path, image_folder: Path, about: Mapping[str, Any]
) -> RawDataset:
    """A data set cut by a split file: {"train": [[relative path, label, class name], …], "val": …, "test": …}."""
    try:
        content = parsed(read_regular(split_file))
        rows = {s: [(str(p), int(label), str(c)) for p, label, c in content[s]] for s in ("train", "val", "test")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{split_file} is not a split file with train, val and test ({error!r})") from None
    names: dict[int, str] = {}
    for path, label, class_name in (row for split in rows.values() for row in split):
        if names.setdefault(label, class_name) != class_name:
            raise DataError(f"{split_file}: label {label} is {names[label]!r} and, at {path}, {class_name!r}")
    if sorted(names) != list(range(len(names))):
        raise DataError(f"{split_file}: labels are not 0 … {len(names) - 1} without gaps")
    root = image_folder.relative_to(folder).as_posix()
    prefix = "" if root == "." else f"{root}/"
    tops = {path.partition("/")[0] for split in rows.values() for path, _, _ in split} - {"", ".", ".."}
    # Today's archive of Stanford Cars unpacks to cars_train/cars_train.
    deeper = {top: f"{top}/" for top in tops if (image_folder / top / top).is_dir()}
    splits, skipped = {}, Counter[str]()
    for split, split_rows in rows.items():
        placed = [(f"{prefix}{deeper.get(p.partition('/')[0], '')}{p}", label) for p, label, _ in split_rows]
        splits[split], missing = items_of(folder, placed)
        skipped.update(missing)
    return RawDataset(
        name=name,
        layout="CoOp split file",
        class_names=tuple(spaced(names[label]) for label in range(len(names))),
        splits=splits,
        reader=FileReader(str(folder)),
        content=hashlib.sha256(read_regular(split_file)).hexdigest(),
        skipped=+skipped,
        **about,
    )


def _image_folder(folder: Path, variant: Variant) -> Path:
    for candidate in variant.options["image_folders"]:
        if (folder / candidate).is_dir():
            # "AnnualCrop/.." is the folder itself, if it has that class.
            return Path(os.path.normpath(folder / candidate))
    raise DataError(f"{folder} has none of the image folders {variant.options['image_folders']}")


def _by_split_file(folder: Path, name: str, variant: Variant, about: Mapping[str, Any]) -> RawDataset:
    split_file = folder / variant.options["split_file"]
    if not split_file.is_file():
        raise DataError(
            f"{folder} has no {split_file.name}, which decides the coop split: download it from CoOp's repository "
            "(its DATASETS.md has the links) into that folder, or use the zscl protocol"
        )
    return split_file_dataset(folder, name, split_file, _image_folder(folder, variant), about)


def _by_variants(folder: Path, name: str, variant: Variant, about: Mapping[str, Any]) -> RawDataset:
    """FGVC-Aircraft: `variants.txt` and a list a split, in the folder itself (CoOp) or in its `data` folder."""
    base = next((b for b in (folder, folder / "data") if (b / "variants.txt").is_file()), None)
    if base is None:
        raise DataError(f"{folder} has no variants.txt (nor data/variants.txt)")
    try:
        names = [line.strip() for line in read_regular(base / "variants.txt").decode().splitlines()]
        lists = {s: read_regular(base / f"images_variant_{s}.txt").decode() for s in ("train", "val", "test")}
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not complete: {error}") from None
    labels = {n: i for i, n in enumerate(names)}
    splits, skipped = {}, Counter[str]()
    for split, text in lists.items():
        rows = [line.split(" ", 1) for line in text.splitlines() if line.strip()]
        unknown = [row for row in rows if len(row) != 2 or row[1].strip() not in labels]
        if unknown:
            raise DataError(f"{base}/images_variant_{split}.txt: {unknown[0]} names no variant of variants.txt")
        splits[split], missing = items_of(base, [(f"images/{i}.jpg", labels[v.strip()]) for i, v in rows])
        skipped.update(missing)
    return RawDataset(
        name=name,
        layout="FGVC-Aircraft lists",
        class_names=tuple(spaced(n) for n in names),
        splits=splits,
        reader=FileReader(str(base)),
        content=hashlib.sha256("".join(lists.values()).encode()).hexdigest(),
        skipped=+skipped,
        **about,
    )


def _by_idx(folder: Path, name: str, variant: Variant, about: Mapping[str, Any]) -> RawDataset:
    base = next((b for b in (folder, folder / "raw", folder / "MNIST" / "raw") if is_idx(b)), folder)
    return idx_dataset(base, name, variant.class_names, **about)


def _by_cifar(folder: Path, name: str, variant: Variant, about: Mapping[str, Any]) -> RawDataset:
    base = next((b for b in (folder, folder / "cifar-100-python") if cifar_kind(b) == "cifar100"), None)
    if base is None:
        raise DataError(f"{folder} has not the files train, test and meta of CIFAR-100 (python version)")
    return cifar_dataset(base, name, "cifar100", **about)


def seeded_80_20(labelled: Sequence[tuple[str, int]]) -> dict[str, list[tuple[str, int]]]:
    """Cut as `torch.utils.data.random_split` with a generator seeded 42 does, which is what ZSCL's code calls."""
    import torch  # which few processes that list images need

    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(ZSCL_SPLIT_SEED)).tolist()
    num_train = int(0.8 * len(labelled))
    return {"train": [labelled[i] for i in order[:num_train]], "test": [labelled[i] for i in order[num_train:]]}


def _by_class_folders(folder: Path, name: str, variant: Variant, about: Mapping[str, Any]) -> RawDataset:
    images = _image_folder(folder, variant)
    excluded = set(variant.options.get("exclude", ()))
    files, skipped = image_files(images)
    files = [f for f in files if "/" in f and f.partition("/")[0] not in excluded]
    folders = sorted({f.partition("/")[0] for f in files})
    if len(folders) != variant.num_classes:
        missing = variant.num_classes - len(folders)
        raise DataError(
            f"{images} has {len(folders)} class folders with images, the {variant.split_protocol} protocol has "
            f"{variant.num_classes}: {abs(missing)} too {'few' if missing > 0 else 'many'}"
        )
    labels = {f: i for i, f in enumerate(folders)}
    labelled = [(f"{images.relative_to(folder).as_posix()}/{f}", labels[f.partition("/")[0]]) for f in files]
    splits, skipped_items = _listed(folder, seeded_80_20(labelled))
    return RawDataset(
        name=name,
        layout="class folders, seeded 80/20 split",
        class_names=variant.class_names or tuple(spaced(f) for f in folders),
        splits=splits,
        reader=FileReader(str(folder)),
        skipped=+(skipped + skipped_items),
        **about,
    )


def _listed(
    root: Path, labelled: Mapping[str, Sequence[tuple[str, int]]]
) -> tuple[dict[str, tuple[RawItem, ...]], Counter[str]]:
    splits, skipped = {}, Counter[str]()
    for split, rows in labelled.items():
        splits[split], missing = items_of(root, rows)
        skipped.update(missing)
    return splits, skipped


def _by_flowers_mat(folder: Path, name: str, variant: Variant, about: Mapping[str, Any]) -> RawDataset:
    """Flowers102's own split: setid.mat and imagelabels.mat beside the images."""
    from scipy.io import loadmat  # a second to import, for this set alone

    images = _image_folder(folder, variant)
    for file in ("setid.mat", "imagelabels.mat"):
        if not (folder / file).is_file():
            raise DataError(f"{folder} has no {file}, which decides the zscl split; it is on the data set's web page")
    ids = loadmat(folder / "setid.mat", squeeze_me=True)
    labels = loadmat(folder / "imagelabels.mat", squeeze_me=True)["labels"]
    root = images.relative_to(folder).as_posix()
    labelled = {
        split: [(f"{root}/image_{i:05d}.jpg", int(labels[i - 1]) - 1) for i in ids[field].tolist()]
        for split, field in (("train", "trnid"), ("test", "tstid"))
    }
    splits, skipped = _listed(folder, labelled)
    return RawDataset(
        name=name,
        layout="Flowers102 lists",
        class_names=variant.class_names,
        splits=splits,
        reader=FileReader(str(folder)),
        skipped=+skipped,
        **about,
    )


def _by_torchvision(folder: Path, name: str, variant: Variant, about: Mapping[str, Any]) -> RawDataset:
    """What torchvision's data set class lists; `folder` is its root, or the folder it keeps below its root."""
    import torchvision.datasets  # two seconds to import, for the zscl protocol alone

    data_class = getattr(torchvision.datasets, variant.options["torchvision"])
    tries = []
    for root in (folder, folder.parent):
        try:
            if "train" in variant.options:
                parts = {s: data_class(root, download=False, **variant.options[s]) for s in ("train", "test")}
                classes = parts["train"].classes
                labelled = {s: _torchvision_items(part, root) for s, part in parts.items()}
            else:
                whole = data_class(root, download=False)
                classes = whole.classes
                # torchvision lists these in the file system's order, so that the published split differs by machine.
                labelled = seeded_80_20(sorted(_torchvision_items(whole, root)))
        except (RuntimeError, OSError) as error:
            # It would have people download into a folder that is already theirs.
            tries.append(str(error).partition(" You can use download=True")[0])
            continue
        splits, skipped = _listed(root, labelled)
        return RawDataset(
            name=name,
            layout=f"torchvision {data_class.__name__}",
            class_names=variant.class_names or tuple(spaced(c) for c in classes),
            splits=splits,
            reader=FileReader(str(root)),
            skipped=+skipped,
            **about,
        )
    raise DataError(f"{folder} is not laid out as torchvision.datasets.{data_class.__name__} wants it: {tries[0]}")


def _torchvision_items(part: Any, root: Path) -> list[tuple[str, int]]:
    # torchvision has no public way to ask for files undecoded; these attributes have had their names since 0.11.
    files = getattr(part, "_image_files", None) or getattr(part, "_images", None)
    pairs = zip(files, part._labels, strict=True) if files else part._samples
    return [(Path(file).relative_to(root).as_posix(), int(label)) for file, label in pairs]


_LAYOUTS: Mapping[str, Callable[[Path, str, Variant, Mapping[str, Any]], RawDataset]] = {
    "split_file": _by_split_file,
    "variants": _by_variants,
    "idx": _by_idx,
    "cifar": _by_cifar,
    "class_folders": _by_class_folders,
    "flowers_mat": _by_flowers_mat,
    "torchvision": _by_torchvision,
}
