"""A Hugging Face `datasets` directory as `save_to_disk` leaves it, read with pyarrow alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from diki_ray.data.sources.folders import SPLIT_FOLDERS
from diki_ray.data.sources.raw import RawDataset, RawItem, sniff_extension, spaced
from diki_ray.errors import DataError
from diki_ray.json_text import parsed
from diki_ray.regular_files import read_regular


@dataclass(frozen=True)
class ArrowReader:
    """Rows of a saved data set; a ref is "<folder of the split>/<row>", `column` holds the images."""

    root: str
    column: str

    def read(self, ref: str) -> tuple[bytes, str]:
        """See Reader."""
        folder, _, row = ref.rpartition("/")
        data = _table(str(Path(self.root) / folder)).column(self.column)[int(row)].as_py()["bytes"]
        if data is None:
            raise DataError(f"row {row} of {self.root}/{folder} refers to a file outside the data set")
        return data, sniff_extension(data)


def is_saved(folder: Path) -> bool:
    """Whether the folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()


@lru_cache(maxsize=4)
def _table(folder: str) -> Any:
    """All rows of a split's folder, memory-mapped."""
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(f"{folder}: reading saved Hugging Face data sets needs pyarrow (pip install pyarrow)") from None
    state = _json(Path(folder) / "state.json")
    files = [Path(folder) / Path(str(part["filename"])).name for part in state["_data_files"]]
    try:
        return pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files])
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot read {folder}: {error}") from None


def _json(path: Path) -> Any:
    try:
        return parsed(read_regular(path))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def arrow_dataset(folder: Path, name: str, **about: Any) -> RawDataset:
    """A saved data set with one Image column and one ClassLabel column; DataError if that is not what it has.

    Its splits may be called whatever SPLIT_FOLDERS knows; without a test split, validation is the test set.
    """
    if (folder / "dataset_dict.json").is_file():
        parts = {SPLIT_FOLDERS.get(str(s), ""): str(s) for s in _json(folder / "dataset_dict.json")["splits"]}
        parts.pop("", None)
    else:
        parts = {"train": "."}
    if "train" not in parts:
        raise DataError(f"{folder} has no train split")
    if "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
    features = _json(folder / parts["train"] / "dataset_info.json").get("features") or {}
    images = [c for c, f in features.items() if f.get("_type") == "Image"]
    labels = [c for c, f in features.items() if f.get("_type") == "ClassLabel"]
    if len(images) != 1 or len(labels) != 1:
        raise DataError(f"{folder}: one Image and one ClassLabel column are needed, found {images} and {labels}")
    import pyarrow.compute as pc

    splits, content = {}, hashlib.sha256()
    for split, part in parts.items():
        table = _table(str(folder / part))
        content.update(read_regular(folder / part / "state.json"))
        sizes = pc.binary_length(pc.struct_field(table.column(images[0]), "bytes")).to_pylist()
        splits[split] = tuple(
            RawItem(f"{part}/{i}", label, size or 0)
            for i, (label, size) in enumerate(zip(table.column(labels[0]).to_pylist(), sizes, strict=True))
            if label is not None and label >= 0  # -1 is how such data sets write "no label"
        )
    return RawDataset(
        name=name,
        layout="saved Hugging Face data set",
        class_names=tuple(spaced(n) for n in features[labels[0]]["names"]),
        splits=splits,
        reader=ArrowReader(str(folder), images[0]),
        content=content.hexdigest(),
        **about,
    )
