"""The library: modules shared by all runs of a storage, each named by its content and found by its key.

library/modules/<digest>.safetensors   immutable bytes, verified by sha256 whenever they are read
library/keys/<key>.json                which digest a key's training gave; the first writer wins
"""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from diki_ray.errors import CorruptError, StorageError, UserError
from diki_ray.json_text import parsed
from diki_ray.store.log import canonical, digest_of, seal, unseal
from diki_ray.store.objects import Objects

_DIGEST = r"[0-9a-f]{64}"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=@,-]{0,199}")


@dataclass(frozen=True)
class Record:
    """What the library knows under one key."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    key: str
    digest: str
    num_bytes: int
    metadata: dict[str, Any] = field(default_factory=dict)


_RECORD: TypeAdapter[Record] = TypeAdapter(Record)


class Library:
    """Content-named blobs and the keys that lead to them. `corrupt` counts damaged objects met so far."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self.corrupt = 0

    @staticmethod
    def open(storage: str) -> "Library":
        """Return the library of a storage: a local path or a bucket's URL."""
        return Library(Objects.open(storage))

    def find(self, key: str) -> Record | None:
        """Return the record of a key, None when there is none or it is damaged; its blob is not looked at."""
        data = self._objects.get(key_path(key))
        if data is None:
            return None
        try:
            record = _RECORD.validate_json(canonical(unseal(data, key_path(key))))
            if record.key != key or not re.fullmatch(_DIGEST, record.digest):
                raise CorruptError(f"{key_path(key)} is the record of another key, or leads nowhere")
            return record
        except (CorruptError, ValidationError):
            self.corrupt += 1
            return None

    def find_intact(self, key: str) -> Record | None:
        """Return the record of a key whose blob is there, has its checksum and names no other key; None otherwise."""
        record = self.find(key)
        if record is None or (blob := self._whole(record.digest)) is None:
            return None
        if own_key(blob) not in (None, key):  # somebody's record leads to a module that was trained from other things
            self.corrupt += 1
            return None
        return record

    def read(self, digest: str) -> bytes:
        """Return the blob, verified; CorruptError when its bytes are not those committed, StorageError when gone."""
        path = module_path(digest)
        blob = self._objects.get(path)
        if blob is None:
            raise StorageError(f"{self._objects.uri}/{path} is missing: run the job again, it trains that task anew")
        if digest_of(blob) != digest:
            self.corrupt += 1
            raise CorruptError(
                f"{self._objects.uri}/{path} is damaged (its sha256 is not its name): run the job again, it trains "
                "that task anew and puts the file right"
            )
        return blob

    def intact(self, digest: str) -> bool:
        """Tell whether the blob is there and has its checksum. It is read: a file's name and size prove nothing."""
        return self._whole(digest) is not None

    def _whole(self, digest: str) -> bytes | None:
        blob = self._objects.get(module_path(digest))
        if blob is not None and digest_of(blob) != digest:
            self.corrupt += 1
            return None
        return blob

    def commit(self, key: str, blob: bytes, metadata: dict[str, Any]) -> Record:
        """Put a blob under its key; durable when it returns. If another writer was first, its record is returned.

        The blob is written before the key: a crash between them leaves a blob that nothing names (`purge` finds it),
        never a key that leads nowhere. Damaged bytes met on the way are replaced.
        """
        if (first := self.find_intact(key)) is not None:
            return first
        record = self._written(key, blob, metadata)
        if not self._objects.put(key_path(key), seal(asdict(record)), create_only=True):
            if (first := self.find_intact(key)) is not None:
                return first
            self._objects.put(key_path(key), seal(asdict(record)))
        return record

    def replace(self, key: str, blob: bytes, metadata: dict[str, Any]) -> Record:
        """Put a blob under a key whatever the key pointed to before; durable when it returns."""
        record = self._written(key, blob, metadata)
        self._objects.put(key_path(key), seal(asdict(record)))
        return record

    def _written(self, key: str, blob: bytes, metadata: dict[str, Any]) -> Record:
        record = Record(key, digest_of(blob), len(blob), metadata)
        if not self.intact(record.digest):
            self._objects.put(module_path(record.digest), blob)
        return record


def own_key(blob: bytes) -> str | None:
    """Return the key that a module's own header says; None where the bytes are no module's."""
    try:
        header = parsed(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        key = parsed(header["__metadata__"]["diki_ray"])["key"]
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    return str(key)


def module_path(digest: str) -> str:
    """Return where the blob of a digest lies in a storage."""
    if not re.fullmatch(_DIGEST, digest):
        raise UserError(f"{digest!r} is no module digest (64 hexadecimal digits)")
    return f"library/modules/{digest}.safetensors"


def key_path(key: str) -> str:
    """Return where the record of a key lies in a storage."""
    return f"library/keys/{checked_name(key, 'module key')}.json"


def checked_name(name: str, what: str) -> str:
    """Return the name itself when it can be a file's, else raise UserError: it comes from people."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no {what}: use letters, digits and . _ + = @ , - (at most 200, a letter or digit first)"
        )
    return name
