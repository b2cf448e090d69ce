"""The cache of a storage: derived bytes under names that say what they depend on; shared by all runs, safe to delete.

cache/<name>   the sha256 of the bytes in hexadecimal (64 characters), then the bytes
"""

from diki_ray.store.log import digest_of
from diki_ray.store.objects import Objects, checked_path

_DIGEST_LENGTH = 64


class Cache:
    """What can be computed again. Any process may write: entries are named by their content and need no lease."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    @staticmethod
    def open(storage: str) -> "Cache":
        """Return the cache of a storage: a local path or a bucket's URL."""
        return Cache(Objects.open(storage))

    def put(self, name: str, data: bytes) -> None:
        """Keep bytes under a name that says what they depend on; durable when it returns."""
        self._objects.put(_path(name), digest_of(data).encode() + data)

    def names(self) -> frozenset[str]:
        """Return the names that something is kept under, by one listing."""
        return frozenset(info.path.removeprefix("cache/") for info in self._objects.list("cache"))

    def get(self, name: str) -> bytes | None:
        """Return the bytes kept under `name`; None when there are none or they are damaged."""
        kept = self._objects.get(_path(name)) or b""
        digest, data = kept[:_DIGEST_LENGTH], kept[_DIGEST_LENGTH:]
        return data if len(digest) == _DIGEST_LENGTH and digest_of(data).encode() == digest else None


def _path(name: str) -> str:
    return checked_path(f"cache/{name}")
