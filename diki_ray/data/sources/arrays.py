"""Data sets that are a few large arrays: idx files (MNIST and its kin) and CIFAR's pickles. Images become PNGs."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diki_ray.data.sources.raw import RawDataset, RawItem, png_bytes, spaced
from diki_ray.errors import DataError
from diki_ray.regular_files import open_regular, read_regular

MAX_ARRAY_BYTES = 2 * 2**30
"""A .gz of some kilobytes can unpack to anything; larger sets than this are not distributed as idx."""

_IDX_STEMS = {"train": "train", "test": "t10k"}
_CIFAR_FILES: Mapping[str, tuple[Mapping[str, tuple[str, ...]], str, str, str]] = {
    "cifar100": ({"train": ("train",), "test": ("test",)}, "meta", "fine_labels", "fine_label_names"),
    "cifar10": (
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        "batches.meta",
        "labels",
        "label_names",
    ),
}


@dataclass(frozen=True)
class ArrayReader:
    """Rows of the image arrays in `folder`; a ref is "<split>/<row>"."""

    kind: str
    folder: str

    def read(self, ref: str) -> tuple[bytes, str]:
        """See Reader."""
        split, _, row = ref.partition("/")
        return png_bytes(_images(self.kind, self.folder, split)[int(row)]), "png"


@lru_cache(maxsize=2)
def _images(kind: str, folder: str, split: str) -> NDArray[np.uint8]:
    """uint8 [N, H, W] or [N, H, W, 3]; kept, because a shard asks for thousands of rows."""
    if kind == "idx":
        return read_idx(_idx_file(Path(folder), split, "images-idx3"), 3)
    return _read_cifar(kind, Path(folder), split)[0]


def is_idx(folder: Path) -> bool:
    """Whether the folder has idx files under the names MNIST gave them."""
    return any(folder.glob("train-images[-.]idx3-ubyte*"))


def _idx_file(folder: Path, split: str, part: str) -> Path:
    stem = f"{_IDX_STEMS[split]}-{part}-ubyte"
    for name in (stem, f"{stem}.gz", stem.replace("-idx", ".idx")):
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} has no {stem} (or {stem}.gz)")


def read_idx(path: Path, num_dimensions: int) -> NDArray[np.uint8]:
    """The uint8 array in an idx file, gzipped or not; DataError if it is not one of that many dimensions."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                data = file.read(MAX_ARRAY_BYTES + 1)
        else:
            data = read_regular(path)
        magic, *shape = struct.unpack(f">{1 + num_dimensions}I", data[: 4 * (1 + num_dimensions)])
    except (OSError, EOFError, struct.error) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    start = 4 * (1 + num_dimensions)
    if magic != 0x0800 + num_dimensions or len(data) - start != int(np.prod(shape, dtype=object)):
        raise DataError(f"{path} is not an idx file of bytes in {num_dimensions} dimensions, or it is cut short")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def idx_dataset(folder: Path, name: str, class_names: Sequence[str], **about: Any) -> RawDataset:
    """Training and test images of an idx folder; validation is taken later. Class names are not in the files."""
    labels, content = {}, hashlib.sha256()
    for split in ("train", "test"):
        labels[split] = read_idx(_idx_file(folder, split, "labels-idx1"), 1)
        images = read_idx(_idx_file(folder, split, "images-idx3"), 3)
        content.update(images.tobytes())
        if len(images) != len(labels[split]):
            raise DataError(f"{folder}: {len(images)} {split} images, but {len(labels[split])} labels")
        image_bytes = int(np.prod(images.shape[1:]))
    num_classes = 1 + max(int(x.max(initial=0)) for x in labels.values())
    names = tuple(class_names) or tuple(map(str, range(num_classes)))
    notes = () if class_names else ("class names are not in idx files: the labels' numbers are used; give class_names",)
    return RawDataset(
        name=name,
        layout="idx",
        class_names=names,
        splits={
            split: tuple(RawItem(f"{split}/{i:06d}", int(label), image_bytes) for i, label in enumerate(values))
            for split, values in labels.items()
        },
        reader=ArrayReader("idx", str(folder)),
        content=content.hexdigest(),
        notes=notes,
        **about,
    )


class _BytesOnly(pickle.Unpickler):
    """Builds numpy arrays of numbers and plain containers, and refuses every other name a pickle may ask for."""

    _ALLOWED: Mapping[tuple[str, str], tuple[str, str]] = {
        ("numpy", "ndarray"): ("numpy", "ndarray"),
        ("numpy", "dtype"): ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
        ("_codecs", "encode"): ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        """Only what CIFAR's files need; called for every global in the pickle."""
        allowed = self._ALLOWED.get((module, name))
        if allowed is None:
            raise DataError(f"the pickle asks for {module}.{name}, which no CIFAR file needs: it is not opened")
        return super().find_class(*allowed)


def read_bytes_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in one of CIFAR's pickles, without running anything it says; DataError if it is another thing."""
    try:
        with open_regular(path) as file:
            content = _BytesOnly(file, encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # a garbled pickle fails in as many ways as it has opcodes
        raise DataError(f"{path} is not one of CIFAR's files ({error!r})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is not one of CIFAR's files: it holds a {type(content).__name__}")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def cifar_kind(folder: Path) -> str | None:
    """ "cifar100", "cifar10" or None, by the files there are."""
    for kind, (files, meta, _, _) in _CIFAR_FILES.items():
        if all((folder / name).is_file() for names in (*files.values(), (meta,)) for name in names):
            return kind
    return None


@lru_cache(maxsize=4)
def _read_cifar(kind: str, folder: Path, split: str) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    files, _, label_field, _ = _CIFAR_FILES[kind]
    parts: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for file in files[split]:
        content = read_bytes_pickle(folder / file)
        data, part_labels = content.get("data"), content.get(label_field)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise DataError(f"{folder / file}: 'data' is not an array of bytes of 3072 columns")
        if not isinstance(part_labels, list) or len(part_labels) != len(data):
            raise DataError(f"{folder / file}: {label_field!r} does not list a label for each of {len(data)} images")
        parts.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.extend(int(label) for label in part_labels)
    return np.ascontiguousarray(np.concatenate(parts)), tuple(labels)


def cifar_dataset(folder: Path, name: str, kind: str, **about: Any) -> RawDataset:
    """Training and test images of CIFAR-10 or CIFAR-100 as python pickles; validation is taken later."""
    content, splits = hashlib.sha256(), {}
    for split in ("train", "test"):
        images, labels = _read_cifar(kind, folder, split)
        content.update(images.tobytes())
        splits[split] = tuple(RawItem(f"{split}/{i:06d}", label, 3072) for i, label in enumerate(labels))
    _, meta, _, names_field = _CIFAR_FILES[kind]
    class_names = read_bytes_pickle(folder / meta).get(names_field)
    if not isinstance(class_names, list) or not all(isinstance(c, str) for c in class_names):
        raise DataError(f"{folder / meta} does not list {names_field!r}")
    return RawDataset(
        name=name,
        layout=kind,
        class_names=tuple(spaced(c) for c in class_names),
        splits=splits,
        reader=ArrayReader(kind, str(folder)),
        content=content.hexdigest(),
        **about,
    )
