"""The lengths and checksums of a large data set's samples lie beside its index, and are read when they are needed.

index.json of 100 million samples would have a gigabyte and take minutes to open. Beyond MOST_INLINE_SAMPLES it names
only the shards, and for each the part that has the two numbers of every sample: part-000000.index.json and so on, each
of about PART_SAMPLES samples, with its sha256 in the index.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, overload

from diki_ray.errors import DataError
from diki_ray.json_text import parsed
from diki_ray.store.files import join, read_bytes, write_bytes

MOST_INLINE_SAMPLES = 4_000_000
"""index.json has about 50 MB then; more than 64 MiB of JSON are not read."""
PART_SAMPLES = 65_536
PART_FILE = r"part-[0-9]{6}\.index\.json"
_KEPT_PARTS = 64
"""A rank reads 24 streams at once, each from a shard of its own. So many parts take 34 MB."""


def packed(blocks: Sequence[int], crc32: Sequence[int]) -> dict[str, str]:
    """Lengths and checksums as one string each: a line instead of one for every sample."""
    return {"blocks": " ".join(map(str, blocks)), "crc32": "".join(f"{c:08x}" for c in crc32)}


def unpacked(data: Any) -> tuple[Iterator[int], Iterator[int]]:
    """(lengths, checksums) of what `packed` gave; KeyError or ValueError where it has another shape."""
    blocks, crc = str(data["blocks"]), str(data["crc32"])
    return map(int, blocks.split()), (int(crc[i : i + 8], 16) for i in range(0, len(crc), 8))


@dataclass(frozen=True)
class PartOf(Sequence[int]):
    """The lengths, or the checksums, of one shard's samples, which are read when one of them is asked for."""

    where: str
    sha256: str
    shard: str
    column: int
    length: int

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[int]: ...
    def __getitem__(self, at: int | slice) -> int | Sequence[int]:
        values = _read(self.where, self.sha256).get(self.shard, ((), ()))[self.column]
        if len(values) != self.length:
            raise DataError(f"{self.where} does not have the {self.length} samples of {self.shard}: prepare it again")
        return values[at]


def write_parts(folder: str, shards: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> dict[str, tuple[str, str]]:
    """Writes the parts of shards (file, lengths, checksums); by file (the part's file, its sha256)."""
    placed: dict[str, tuple[str, str]] = {}
    for number, group in enumerate(_groups(shards)):
        file = f"part-{number:06d}.index.json"
        data = json.dumps({shard: packed(blocks, crc32) for shard, blocks, crc32 in group}).encode()
        write_bytes(join(folder, file), data)
        placed |= dict.fromkeys((shard for shard, _, _ in group), (file, hashlib.sha256(data).hexdigest()))
    return placed


def _groups(shards: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> Iterator[list[Any]]:
    group, filled = list[Any](), 0
    for shard in shards:
        if group and filled + len(shard[1]) > PART_SAMPLES:
            yield group
            group, filled = [], 0
        group.append(shard)
        filled += len(shard[1])
    if group:
        yield group


@lru_cache(maxsize=_KEPT_PARTS)
def _read(where: str, sha256: str) -> dict[str, tuple[array[int], array[int]]]:
    try:
        data = read_bytes(where)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(f"{where} does not have the checksum it was written with: prepare the data set again")
        columns = {shard: unpacked(strings) for shard, strings in parsed(data).items()}
        return {shard: (array("I", blocks), array("I", crc32)) for shard, (blocks, crc32) in columns.items()}
    except FileNotFoundError:
        raise DataError(f"there is no {where}, a part of a data set's index: prepare the data set again") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"{where} is no part of a data set's index ({error!r}): prepare the data set again") from None
