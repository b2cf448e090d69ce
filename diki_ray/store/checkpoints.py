"""Checkpoints of a task in training: the newest whole one wins, the one before is the fallback.

runs/<run>/checkpoints/<key>/<step>-<digest>.safetensors   written first
runs/<run>/checkpoints/<key>/<step>.json                   written last: sha256, size, metadata; nothing counts without

The blob's name holds its digest so that saving a step again can't damage the one that is there.
"""

import re
from collections.abc import Iterator
from typing import Any

from diki_ray.errors import CorruptError
from diki_ray.store.library import checked_name
from diki_ray.store.log import digest_of, seal, unseal
from diki_ray.store.objects import Objects

_KEPT = 2
_BLOB = r"\d{8,12}-[0-9a-f]{16}\.safetensors"


class Checkpoints:
    """The checkpoints of one run. `corrupt` counts damaged ones that were passed over."""

    def __init__(self, objects: Objects, folder: str) -> None:
        self._objects = objects
        self.folder = folder
        self.corrupt = 0

    def save(self, key: str, step: int, blob: bytes, metadata: dict[str, Any]) -> None:
        """Keep a checkpoint, durable when it returns, and delete older ones than the last two."""
        digest = digest_of(blob)
        name = f"{step:08d}-{digest[:16]}.safetensors"
        self._objects.put(f"{self._of(key)}/{name}", blob)
        about = {"step": step, "blob": name, "sha256": digest, "num_bytes": len(blob), "metadata": metadata}
        self._objects.put(f"{self._of(key)}/{step:08d}.json", seal(about))
        self._trim(key, name)

    def load(self, key: str) -> tuple[int, bytes, dict[str, Any]] | None:
        """Return (step, blob, metadata) of the newest checkpoint that is whole, or None; damaged ones are counted."""
        for path in reversed(self._descriptions(key)):
            try:
                return self._read(key, path)
            except CorruptError:
                self.corrupt += 1
        return None

    def drop(self, key: str) -> None:
        """Delete all checkpoints of a key. Descriptions go first: a crash leaves blobs that count for nothing."""
        paths = [info.path for info in self._objects.list(self._of(key))]
        self._objects.delete(sorted(paths, key=lambda path: not path.endswith(".json")))

    def problems(self) -> list[str]:
        """Return what is wrong with each damaged checkpoint of the run."""
        found = []
        for key in self._objects.folders(self.folder):
            for path in self._descriptions(key):
                try:
                    self._read(key, path)
                except CorruptError as error:
                    found.append(str(error))
        return found

    def _read(self, key: str, path: str) -> tuple[int, bytes, dict[str, Any]]:
        about = _checked(unseal(self._objects.get(path) or b"", path), path)
        blob = self._objects.get(f"{self._of(key)}/{about['blob']}")
        if blob is None or digest_of(blob) != about.get("sha256"):
            state = "missing" if blob is None else "damaged"
            raise CorruptError(f"{path}: its blob {about['blob']} is {state}; the checkpoint before it is used")
        return about["step"], blob, about["metadata"]

    def _trim(self, key: str, newest_blob: str) -> None:
        kept = self._descriptions(key)[-_KEPT:]
        first_step = kept[0].rpartition("/")[2].removesuffix(".json")
        old, step = [], newest_blob.partition("-")[0]
        for info in self._objects.list(self._of(key)):
            name = info.path.rpartition("/")[2]
            replaced = name.startswith(f"{step}-") and name != newest_blob
            if name[: len(first_step)] < first_step or replaced:
                old.append(info.path)
        self._objects.delete(sorted(old, key=lambda path: not path.endswith(".json")))

    def _descriptions(self, key: str) -> list[str]:
        return [info.path for info in self._objects.list(self._of(key)) if info.path.endswith(".json")]

    def wholes(self) -> Iterator[tuple[str, bytes]]:
        """Yield the path and the bytes of each whole checkpoint of the run."""
        for key in self._objects.folders(self.folder):
            for path in self._descriptions(key):
                try:
                    yield path, self._read(key, path)[1]
                except CorruptError:
                    continue  # one of `problems`

    def _of(self, key: str) -> str:
        return f"{self.folder}/{checked_name(key, 'module key')}"


def _checked(about: dict[str, Any], path: str) -> dict[str, Any]:
    """The description; CorruptError for one that no training writes, whose blob may lie anywhere."""
    step, blob, metadata = about.get("step"), about.get("blob"), about.get("metadata")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0 or not isinstance(metadata, dict):
        raise CorruptError(f"{path}: it has no step or no metadata; the checkpoint before it is used")
    if not isinstance(blob, str) or not re.fullmatch(_BLOB, blob):
        raise CorruptError(f"{path}: it names no blob of a checkpoint's; the checkpoint before it is used")
    return about
