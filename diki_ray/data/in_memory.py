"""Data as Python gives them: folders, arrays or lists of images with labels, and torch Datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diki_ray.config.places import absolute
from diki_ray.data.images import image_of
from diki_ray.data.index import DatasetIndex
from diki_ray.data.prepare import Preparation, Settings, look, made, plan_listed
from diki_ray.data.sources.folders import SPLIT_FOLDERS
from diki_ray.data.sources.raw import RawDataset, RawItem, png_bytes
from diki_ray.errors import DataError


@dataclass(frozen=True)
class MemoryReader:
    """Images of each split; a ref is "<split>/<number>"."""

    splits: Mapping[str, Any]

    def read(self, ref: str) -> tuple[bytes, str]:
        """See Reader."""
        split, _, number = ref.partition("/")
        image, _ = self.splits[split][int(number)]
        return png_bytes(np.asarray(image_of(image))), "png"


def prepared(
    data: Any,
    labels: Any,
    root: str,
    *,
    name: str | None = None,
    class_names: Sequence[str] = (),
    template: str | None = None,
    settings: Settings,
) -> DatasetIndex:
    """The data set, prepared in `root` unless it is there.

    data: whatever `prepare.ensure` takes as its source, or as `memory_dataset` with its labels.

    Raises:
        DataError: data that cannot be learnt from.
    """
    found: DatasetIndex | Preparation
    if isinstance(data, str | Path):
        if labels is not None:
            raise DataError(f"{data}: the labels of files are their folders; labels= is for images in memory.")
        found = look(
            absolute(str(data)), root, name=name, template=template, class_names=class_names, settings=settings
        )
    elif name is None:
        raise DataError("images in memory have no name that their task could get: give name=.")
    else:
        raw = memory_dataset(data, labels, name, class_names)
        found = plan_listed(raw, root, "memory", template=template, settings=settings)
    known = found if isinstance(found, DatasetIndex) else found.raw
    if len(known.class_names) == 1:
        raise DataError(f"{known.name} has one class, {known.class_names[0]!r}: a task tells two or more apart.")
    return found if isinstance(found, DatasetIndex) else made(found)


class _Pairs:
    """Images and their labels as a data set of pairs."""

    def __init__(self, name: str, images: Sequence[Any], labels: Sequence[Any]) -> None:
        if len(images) != len(labels):
            raise DataError(f"{name}: there are {len(images)} images and {len(labels)} labels.")
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        return self._images[number], self._labels[number]


def memory_dataset(data: Any, labels: Any, name: str, class_names: Sequence[str] = ()) -> RawDataset:
    """Lists images in memory; every image is looked at once, for the checksum.

    data: images, with `labels`; a data set of (image, label) pairs, as torch has it; or either for each split, in a
        dict (`{"train": …, "test": …}`), where images and labels are a pair.
    class_names: names of the labels 0, 1, …; by default those in a data set's `classes`, or the labels themselves,
        sorted, where they are text.

    Raises:
        DataError: no data set, labels without names, labels that are neither names nor numbers, an image of no known
            kind.
    """
    splits = {split: _pairs(of_split, given, name) for split, of_split, given in _splits(data, labels, name)}
    content, found = hashlib.sha256(), dict[str, list[tuple[Any, int]]]()
    for split, pairs in splits.items():
        found[split] = []
        for number in range(len(pairs)):
            image, label = pairs[number]
            try:
                pixels = np.asarray(image_of(image))
            except DataError as error:
                raise DataError(f"{name}: image {number} of {split}: {error}") from None
            content.update(f"{split} {pixels.shape}".encode() + pixels.tobytes())
            found[split].append((label, pixels.size))
    names = tuple(class_names) or _own_names(splits, [label for of in found.values() for label, _ in of], name)
    if len(set(names)) < len(names):
        raise DataError(f"{name}: two classes have one name, and no text could tell them apart: {', '.join(names)}.")
    numbers = {known: number for number, known in enumerate(names)}
    return RawDataset(
        name=name,
        layout="in memory",
        class_names=names,
        splits={
            split: tuple(
                RawItem(f"{split}/{n:06d}", _number(label, numbers, name), size) for n, (label, size) in enumerate(of)
            )
            for split, of in found.items()
        },
        reader=MemoryReader(splits),
        content=content.hexdigest(),
    )


def _splits(data: Any, labels: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if not isinstance(data, Mapping):
        yield "train", data, labels
        return
    if unknown := [split for split in data if split not in SPLIT_FOLDERS]:
        raise DataError(f"{name}: {unknown[0]!r} is no split; there are train, val and test.")
    for split, value in data.items():
        images, given = value if isinstance(value, tuple) else (value, None)
        yield SPLIT_FOLDERS[split], images, given


def _pairs(data: Any, labels: Any, name: str) -> Any:
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise DataError(
            f"{name}: a {type(data).__name__} is no data set: give a folder, images with labels, or a data set with a "
            "length and (image, label) pairs."
        )
    if labels is not None:
        return _Pairs(name, data, labels)
    if len(data) and not (isinstance(data[0], Sequence) and len(data[0]) == 2):
        raise DataError(f"{name}: give labels with the images, or a data set of (image, label) pairs.")
    return data


def _own_names(splits: Mapping[str, Any], labels: Sequence[Any], name: str) -> tuple[str, ...]:
    named = next((pairs.classes for pairs in splits.values() if hasattr(pairs, "classes")), None)
    if named is None and not all(isinstance(label, str) for label in labels):
        raise DataError(f"{name}: labels are numbers, and CLIP knows classes by name: give class_names.")
    return tuple(map(str, named if named is not None else sorted(set(labels))))


def _number(label: Any, numbers: Mapping[str, int], name: str) -> int:
    if isinstance(label, str):
        if label not in numbers:
            raise DataError(f"{name}: the label {label!r} is none of the class names {', '.join(numbers)}.")
        return numbers[label]
    try:
        number = int(label)
    except (TypeError, ValueError):
        number = None
    if number is None or number != label:
        raise DataError(f"{name}: the label {label!r} is neither a number nor a class name.")
    return number
