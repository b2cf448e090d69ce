"""The index of a prepared data set: what its shards hold, checked before anything is read from them.

A prepared data set is one folder, local or in object storage, with WebDataset tars and one `index.json`, written last:
a folder without it is an unfinished preparation. For every sample the index keeps its length in the tar (in blocks of
512 bytes) and a CRC-32. Eight characters and a few digits a sample buy two things: any sample can be read by one range
request, so that a rank starts anywhere without rereading; and a flipped bit costs the sample it hit instead of shifting
or silently changing all that follow.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diki_ray.config.templates import template_fault
from diki_ray.data.index_parts import MOST_INLINE_SAMPLES, PART_FILE, PartOf, packed, unpacked, write_parts
from diki_ray.errors import DataError
from diki_ray.json_text import parsed
from diki_ray.store.files import folders, join, read_bytes, scheme_of, write_bytes

INDEX_FILE = "index.json"
FORMAT = 1
FORMAT_IN_PARTS = 2
"""An index of very many samples has this format: their lengths and checksums lie beside it (index_parts.py)."""
TAR_BLOCK_BYTES = 512
SPLIT_PROTOCOLS = ("coop", "zscl", "own", "embedded")


@dataclass(frozen=True)
class Shard:
    """One tar of a split.

    `blocks[i]` is the length of sample i in blocks of 512 bytes, headers and padding included; `crc32[i]` is the CRC-32
    of those bytes. `sha256` is over the whole file. Of a large data set both are read when they are first asked for.
    """

    file: str
    num_samples: int
    num_bytes: int
    sha256: str
    blocks: Sequence[int] = ()
    crc32: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("blocks", "crc32"):
            if isinstance(values := getattr(self, name), list):  # as it comes back from the JSON of another process
                object.__setattr__(self, name, tuple(values))

    def check(self, where: str) -> None:
        """Raise DataError unless the numbers agree with each other; `where` names the index in the message."""
        if not re.fullmatch(r"[\w][\w.-]*\.tar", self.file):
            raise DataError(f"{where}: {self.file!r} is not a shard's file name (a plain name ending in .tar)")
        if len(self.blocks) != self.num_samples or len(self.crc32) != self.num_samples:
            raise DataError(
                f"{where}: shard {self.file} says {self.num_samples} samples, but lists {len(self.blocks)} lengths "
                f"and {len(self.crc32)} checksums; prepare the data set again"
            )
        # A part that is read later has its own checksum, and is compared with the shard's number of samples then.
        known = self.blocks if isinstance(self.blocks, tuple) else ()
        if any(b < 2 for b in known) or sum(known) * TAR_BLOCK_BYTES > self.num_bytes:
            raise DataError(f"{where}: the samples of shard {self.file} do not fit its {self.num_bytes} bytes")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise DataError(f"{where}: shard {self.file} has no SHA-256 checksum")

    def as_json(self, part: tuple[str, str] | None = None) -> dict[str, Any]:
        """A JSON object; with the file and sha256 of the part that has its lengths and checksums, else with these."""
        return {
            "file": self.file,
            "num_samples": self.num_samples,
            "num_bytes": self.num_bytes,
            "sha256": self.sha256,
        } | (packed(self.blocks, self.crc32) if part is None else {"part": list(part)})

    @classmethod
    def from_json(cls, data: Mapping[str, Any], folder: str = "") -> Shard:
        """The inverse of `as_json`; KeyError, TypeError or ValueError where `data` has another shape. folder: of the
        parts."""
        file, num_samples = str(data["file"]), int(data["num_samples"])
        blocks: Sequence[int]
        crc32: Sequence[int]
        if "part" in data:
            name, sha256 = map(str, data["part"])
            if not re.fullmatch(PART_FILE, name):
                raise ValueError(f"{name!r} is no part of an index")
            blocks, crc32 = (PartOf(join(folder, name), sha256, file, column, num_samples) for column in (0, 1))
        else:
            blocks, crc32 = map(tuple, unpacked(data))
        return cls(file, num_samples, int(data["num_bytes"]), str(data["sha256"]), blocks, crc32)


@dataclass(frozen=True)
class Split:
    """The shards of "train", "val" or "test" in reading order, and how many samples each class has."""

    name: str
    shards: tuple[Shard, ...]
    samples_per_class: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        """Samples over all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)


@dataclass(frozen=True)
class DatasetIndex:
    """What a prepared data set holds. Valid by construction: DataError where its parts disagree.

    `uri` is the folder (local path, s3://, gs://, az://, http(s)://). The first template trains, the mean of all of
    them tests. `provenance` says where the data came from and how they were cut; it takes no part in the digest.
    """

    uri: str
    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    split_protocol: str
    splits: Mapping[str, Split]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = join(self.uri, INDEX_FILE)
        if not self.name or not self.class_names or not all(isinstance(c, str) and c.strip() for c in self.class_names):
            raise DataError(f"{where}: a data set needs a name and at least one class, and no class name may be empty")
        if not self.templates:
            raise DataError(f"{where}: a data set needs at least one template for its class names")
        for template in self.templates:
            if (fault := template_fault(template)) is not None:
                raise DataError(f"{where}: the template {template!r:.200} {fault}")
        if self.split_protocol not in SPLIT_PROTOCOLS:
            raise DataError(f"{where}: split_protocol is {self.split_protocol!r}; allowed are {SPLIT_PROTOCOLS}")
        files = [shard.file for split in self.splits.values() for shard in split.shards]
        if len(set(files)) != len(files):
            raise DataError(f"{where}: the same shard is listed twice")
        for name, split in self.splits.items():
            if name != split.name or len(split.samples_per_class) != len(self.class_names):
                raise DataError(f"{where}: split {name!r} does not match the {len(self.class_names)} classes")
            if sum(split.samples_per_class) != split.num_samples or min(split.samples_per_class) < 0:
                raise DataError(f"{where}: split {name!r}: samples per class and samples per shard disagree")
            for shard in split.shards:
                shard.check(where)

    def split(self, name: str) -> Split:
        """The split of that name; DataError says which there are."""
        if name not in self.splits:
            raise DataError(f"{join(self.uri, INDEX_FILE)} has no split {name!r}, only {sorted(self.splits)}")
        return self.splits[name]

    def shard_uri(self, shard: Shard) -> str:
        """Where a shard of this data set lies."""
        return join(self.uri, shard.file)

    def digest(self, *split_names: str) -> str:
        """SHA-256 (hex) over what the named splits (all, when none is named) hold: bytes, classes, templates.

        The place takes no part in it, nor do the name and the provenance: the same data elsewhere have the same digest.
        """
        content = {
            "format": FORMAT,
            "class_names": list(self.class_names),
            "templates": list(self.templates),
            "splits": {
                name: [[shard.sha256, shard.num_samples] for shard in self.split(name).shards]
                for name in sorted(split_names or self.splits)
            },
        }
        return hashlib.sha256(_canonical(content)).hexdigest()

    def save(self) -> None:
        """Write `index.json` into `uri`, atomically; the shards must be there already. Durable when it returns."""
        shards = [shard for split in self.splits.values() for shard in split.shards]
        parts: dict[str, tuple[str, str]] = {}
        if sum(shard.num_samples for shard in shards) > MOST_INLINE_SAMPLES:
            parts = write_parts(self.uri, [(shard.file, shard.blocks, shard.crc32) for shard in shards])
        content = {
            "format": FORMAT_IN_PARTS if parts else FORMAT,
            "name": self.name,
            "split_protocol": self.split_protocol,
            "templates": list(self.templates),
            "class_names": list(self.class_names),
            "provenance": dict(self.provenance),
            "splits": {
                name: {
                    "num_samples": split.num_samples,
                    "samples_per_class": list(split.samples_per_class),
                    "shards": [shard.as_json(parts.get(shard.file)) for shard in split.shards],
                }
                for name, split in self.splits.items()
            },
        }
        content["checksum"] = hashlib.sha256(_canonical(content)).hexdigest()
        write_bytes(join(self.uri, INDEX_FILE), json.dumps(content, indent=1, ensure_ascii=False).encode())

    @classmethod
    def load(cls, uri: str) -> DatasetIndex:
        """Read the index in folder `uri` (or at `uri`, if it names the file); DataError if missing or damaged."""
        uri = str(uri).removesuffix(f"/{INDEX_FILE}").rstrip("/") or "/"
        where = join(uri, INDEX_FILE)
        try:
            raw = read_bytes(where)
        except FileNotFoundError:
            raise DataError(
                f"there is no {where}: not a prepared data set, or its preparation did not finish; "
                "run `diki-ray prepare` on it"
            ) from None
        try:
            data = parsed(raw)
            checksum = data.pop("checksum", None)
            if data["format"] not in (FORMAT, FORMAT_IN_PARTS):
                raise DataError(f"{where} has format {data['format']}, this version reads {FORMAT}: prepare it again")
            if checksum != hashlib.sha256(_canonical(data)).hexdigest():
                raise DataError(f"{where} does not have the checksum it was written with: prepare the data set again")
            splits = {
                name: Split(
                    name=name,
                    shards=tuple(Shard.from_json(shard, uri) for shard in split["shards"]),
                    samples_per_class=tuple(split["samples_per_class"]),
                )
                for name, split in data["splits"].items()
            }
            return cls(
                uri=uri,
                name=data["name"],
                class_names=tuple(data["class_names"]),
                templates=tuple(data["templates"]),
                split_protocol=data["split_protocol"],
                splits=splits,
                provenance=data["provenance"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where} is not the index of a data set ({error!r}): prepare it again") from None


def find_prepared(place: str) -> str | None:
    """Finds the prepared data set at `place`, by its folder or by its name there without the digest.

    `prepared/Caltech101` is `prepared/Caltech101-8564f50d` where that is the only one of the name. Returns its folder,
    or None where there is neither.

    Raises:
        DataError: several have this name; all of them are listed. StorageError: the place cannot be listed.
    """
    place = place.removesuffix(f"/{INDEX_FILE}").rstrip("/") or "/"
    if _has_index(place):
        return place
    if scheme_of(place).startswith("http") or os.path.exists(place):  # a web server has no listing
        return None
    parent, separator, name = place.rpartition("/")
    parent = parent or separator or "."
    wanted = re.compile(re.escape(name) + "-[0-9a-f]{8}")
    named = [join(parent, folder) for folder in folders(parent) if wanted.fullmatch(folder)]
    found = [folder for folder in named if _has_index(folder)]  # without one it was never finished
    if len(found) > 1:
        raise DataError(f"{place} may be any of {', '.join(found)}: write the one that is meant with its digest")
    return found[0] if found else None


def _has_index(folder: str) -> bool:
    try:
        return bool(read_bytes(join(folder, INDEX_FILE), 0, 1))
    except FileNotFoundError:
        return False


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
