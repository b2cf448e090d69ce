"""What every source comes down to: which images there are, their labels, and how to get at one image's bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diki_ray.data.images import EXTENSIONS
from diki_ray.errors import DataError
from diki_ray.regular_files import IMAGE_BYTES, read_regular

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class RawItem:
    """An image of a source. `ref` tells the source's reader where it is and is unique in the data set."""

    ref: str
    label: int
    num_bytes: int


class Reader(Protocol):
    """Gets an image's bytes. Picklable, because shards are written by other processes."""

    def read(self, ref: str) -> tuple[bytes, str]:
        """The bytes of an image file and its extension (lower case, no dot); OSError or DataError if it cannot."""
        ...


@dataclass(frozen=True)
class FileReader:
    """Images that are files below `root`; their bytes are kept as they are."""

    root: str

    def read(self, ref: str) -> tuple[bytes, str]:
        """See Reader."""
        data = read_regular(Path(self.root) / ref, limit=IMAGE_BYTES)
        extension = Path(ref).suffix[1:].lower()
        return data, extension if extension in EXTENSIONS else sniff_extension(data)


@dataclass(frozen=True)
class RawDataset:
    """A source, listed but not read.

    `layout` names what was recognised. `templates` and `class_names` are what the source itself or the catalogue says.
    `content` is a checksum over whatever decides the data beyond names, labels and sizes of files; with
    `content_is_all` it stands for those too, and `splits` may be costly to look into. `skipped` counts by reason what
    was seen and left out while listing.
    """

    name: str
    layout: str
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[RawItem, ...]]
    reader: Reader
    templates: tuple[str, ...] = ()
    split_protocol: str = "own"
    content: str = ""
    content_is_all: bool = False
    known_sizes: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def sniff_extension(data: bytes) -> str:
    """The extension that fits the bytes of an image whose name does not say; "jpg" if nothing does."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return {"JPEG": "jpg", "TIFF": "tif"}.get(image.format or "", (image.format or "jpg").lower())
    except Exception:  # decoding comes later and gives the reason
        return "jpg"


def spaced(name: str) -> str:
    """A class name as it stands in a sentence: underscores become spaces."""
    return name.replace("_", " ").strip()


def words_of_folder(name: str) -> str:
    """A class folder's name as words: `red_fox` is red fox, and so is RedFox, for CLIP's tokenizer has no case.

    Only a name without any other separator is split at its capitals, and only after a small letter: TVset stays whole.
    """
    return spaced(name if re.search(r"[\s_-]", name) else re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))


def named_classes(sources: Sequence[str], names: Iterable[str], where: Path) -> tuple[str, ...]:
    """The classes' names, which are made of what the source calls them; DataError where two of them become one name,
    for no text could tell such classes apart."""
    made: dict[str, str] = {}
    for source, name in zip(sources, names, strict=True):
        if (other := made.setdefault(name, source)) != source:
            raise DataError(
                f"{where}: the classes {other!r} and {source!r} both become {name!r}, and no text could tell them "
                "apart: merge their images into one, or rename one"
            )
    return tuple(made)


def png_bytes(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of uint8 [H, W] or [H, W, 3]."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def inside(root: Path, ref: str) -> Path:
    """`root / ref`; DataError if that is not below `root`."""
    path = Path(ref)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{ref!r} leaves the data set's folder {root}; every image must lie below it")
    return root / path
