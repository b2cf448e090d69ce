"""Plain image folders and manifests: what people have when their data come from no benchmark."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diki_ray.data.images import EXTENSIONS
from diki_ray.data.sources.raw import FileReader, RawDataset, RawItem, inside, named_classes, spaced, words_of_folder
from diki_ray.errors import DataError
from diki_ray.json_text import parsed
from diki_ray.regular_files import MANIFEST_BYTES, read_regular

SPLIT_FOLDERS: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Names of folders, and of a manifest's split column, that mean a split."""

PLAIN = "class folders"
"""The layout that is tried last: any folder of folders of images has it."""

MANIFESTS = ("manifest.csv", "manifest.jsonl", "metadata.csv", "metadata.jsonl")
_PATH_COLUMNS = ("path", "file_name", "filename", "file", "image", "filepath")
_LABEL_COLUMNS = ("label", "class", "class_name", "category", "classname")
_SPLIT_COLUMNS = ("split", "subset", "partition")


def image_files(folder: Path) -> tuple[list[str], Counter[str]]:
    """Paths of the images below `folder`, relative to it and sorted, and what else lies there, counted by reason."""
    found: list[str] = []
    skipped: Counter[str] = Counter()
    for directory, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if name.startswith(".") or name == "Thumbs.db":
                continue
            path = Path(directory, name)
            if path.suffix[1:].lower() not in EXTENSIONS:
                skipped["not an image file"] += 1
            elif not path.is_file():
                skipped["broken link"] += 1
            elif not _is_utf8(path.relative_to(folder).as_posix()):
                skipped["file name is not UTF-8"] += 1
            else:
                found.append(path.relative_to(folder).as_posix())
    return sorted(found), skipped


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def items_of(root: Path, labelled: Sequence[tuple[str, int]]) -> tuple[tuple[RawItem, ...], Counter[str]]:
    """RawItems of files below `root` with their sizes; files that are not there are counted."""
    items, skipped = [], Counter[str]()
    for ref, label in labelled:
        try:
            about = inside(root, ref).stat()
        except (OSError, ValueError):  # ValueError: a name with a zero byte
            skipped["file missing"] += 1
            continue
        if stat.S_ISREG(about.st_mode):
            items.append(RawItem(ref, label, about.st_size))
        else:
            skipped["not a regular file"] += 1
    return tuple(items), skipped


def split_folders(folder: Path) -> dict[str, str]:
    """Split → name of its subfolder, where the folder has a `train` one; otherwise empty."""
    found: dict[str, str] = {}
    for name in sorted(child.name for child in folder.iterdir() if child.is_dir()):
        split = SPLIT_FOLDERS.get(name.lower())
        if split in found:
            raise DataError(f"{folder} has both {found[split]!r} and {name!r} for the {split} split: keep one")
        if split:
            found[split] = name
    return found if "train" in found else {}


def folder_dataset(folder: Path, name: str, **about: Any) -> RawDataset:
    """Images in one folder a class, with or without split folders above. The folder's name is the class's.

    With `train` and one other split folder only, the other one is the test set, as in ImageNet's `train` and `val`.
    """
    splits = split_folders(folder) or {"train": ""}
    for subfolder in splits.values():
        for child in (folder / subfolder).iterdir():
            if child.is_dir() and not _is_utf8(child.name):
                raise DataError(
                    f"{folder}: the name of the class folder {os.fsencode(child.name)!r} is not UTF-8: rename it"
                )
    notes: list[str] = []
    if "val" in splits and "test" not in splits:
        notes.append(f"the folder {splits['val']!r} is used as test set, because there is no other")
        splits["test"] = splits.pop("val")
    skipped: Counter[str] = Counter()
    paths: dict[str, list[str]] = {}
    for split, subfolder in splits.items():
        files, other = image_files(folder / subfolder)
        skipped.update(other)
        skipped["image without a class"] += sum("/" not in f for f in files)
        paths[split] = [f for f in files if "/" in f]
    classes = sorted({path.partition("/")[0] for files in paths.values() for path in files})
    if not classes:
        raise DataError(
            f"{folder} has no images in class folders: expected <class>/<image>, or train/<class>/<image> and so on"
        )
    labels = {c: i for i, c in enumerate(classes)}
    items = {}
    for split, files in paths.items():
        prefix = f"{splits[split]}/" if splits[split] else ""
        items[split], missing = items_of(folder, [(prefix + f, labels[f.partition("/")[0]]) for f in files])
        skipped.update(missing)
    empty = sorted(
        child.name
        for subfolder in splits.values()
        for child in (folder / subfolder).iterdir()
        if child.is_dir() and child.name not in labels and not child.name.startswith(".")
    )
    if empty:
        notes.append(f"folders without an image are not classes: {', '.join(dict.fromkeys(empty))}")
    return RawDataset(
        name=name,
        layout="class folders in split folders" if split_folders(folder) else PLAIN,
        class_names=named_classes(classes, map(words_of_folder, classes), folder),
        splits=items,
        reader=FileReader(str(folder)),
        skipped=+skipped,
        notes=tuple(notes),
        **about,
    )


def manifest_in(folder: Path) -> Path | None:
    """The manifest that a folder has, if any."""
    return next((folder / name for name in MANIFESTS if (folder / name).is_file()), None)


def manifest_dataset(manifest: Path, name: str, class_names: Sequence[str] = (), **about: Any) -> RawDataset:
    """Images listed in a .csv or .jsonl with their paths (relative to it), labels and, if it has them, splits.

    Labels are class names, or numbers into `class_names`. Rows without a label are counted and left out; without
    splits all rows are training images. DataError for a missing column, an unknown split or a path outside the folder.
    """
    labelled: dict[str, list[tuple[str, str]]] = {"train": []}
    skipped: Counter[str] = Counter()
    for number, row in enumerate(_rows(manifest), start=1):
        path = _field(row, _PATH_COLUMNS)
        if path is None:
            raise DataError(f"{manifest}, row {number}: no path; give one of the columns {_PATH_COLUMNS}")
        label = _field(row, _LABEL_COLUMNS)
        if label is None:
            skipped["image without a class"] += 1
            continue
        split = (_field(row, _SPLIT_COLUMNS) or "train").lower()
        if split not in SPLIT_FOLDERS:
            raise DataError(f"{manifest}, row {number}: split {split!r} is none of {tuple(SPLIT_FOLDERS)}")
        labelled.setdefault(SPLIT_FOLDERS[split], []).append((path, label))
    seen = {label for rows in labelled.values() for _, label in rows}
    names = tuple(class_names) or tuple(sorted(seen))
    if not names:
        raise DataError(f"{manifest} lists no labelled image; labels are read from the columns {_LABEL_COLUMNS}")
    numbers = {n: i for i, n in enumerate(names)}
    if class_names and not seen <= set(names):
        numbers = {str(i): i for i in range(len(names))}
        if not seen <= set(numbers):
            wrong = sorted(seen - set(numbers))[:3]
            raise DataError(f"{manifest}: labels {wrong} are neither class names nor numbers below {len(names)}")
    splits = {}
    for split, rows in labelled.items():
        splits[split], missing = items_of(manifest.parent, [(path, numbers[label]) for path, label in rows])
        skipped.update(missing)
    return RawDataset(
        name=name,
        layout="manifest",
        class_names=named_classes(names, map(spaced, names), manifest),
        splits=splits,
        reader=FileReader(str(manifest.parent)),
        content=hashlib.sha256(read_regular(manifest, limit=MANIFEST_BYTES)).hexdigest(),
        skipped=+skipped,
        **about,
    )


def _rows(manifest: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with io.StringIO(read_regular(manifest, limit=MANIFEST_BYTES).decode("utf-8-sig"), newline="") as file:
            if manifest.suffix.lower() == ".jsonl":
                yield from (parsed(line) for line in file if line.strip())
            else:
                yield from csv.DictReader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read manifest {manifest}: {error}") from None


def _field(row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    if not isinstance(row, Mapping):
        return None
    lowered = {str(key).strip().lower(): value for key, value in row.items()}
    value = next((lowered[c] for c in columns if lowered.get(c) is not None), None)
    text = "" if value is None else str(value).strip()
    return text or None
