"""The embedded world's tasks, drawn in memory."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import PIL

from diki_ray.data.sources.raw import RawDataset, RawItem
from diki_ray.data.world import tasks as world
from diki_ray.errors import DataError

_DRAWN_BYTES = 3 * world.IMAGE_SIZE_PX**2


@dataclass(frozen=True)
class EmbeddedReader:
    """Pictures of one task; a ref is "<split>/<number>"."""

    task: str

    def read(self, ref: str) -> tuple[bytes, str]:
        """See Reader."""
        split, _, number = ref.partition("/")
        return _drawn(self.task, split)[int(number)][0], "png"


@lru_cache(maxsize=3)
def _drawn(task: str, split: str) -> tuple[tuple[bytes, int], ...]:
    """PNG bytes and label of every picture; a split is drawn as one stream, so it is drawn once."""
    drawn = []
    for image, label in world.samples(task, split):
        out = io.BytesIO()
        image.save(out, "PNG")
        drawn.append((out.getvalue(), label))
    return tuple(drawn)


class _DrawnSplits(Mapping[str, tuple[RawItem, ...]]):
    """The items of each split. Labels come with the pictures, so looking at one draws a split (half a second)."""

    def __init__(self, task: str) -> None:
        self._task = task

    def __getitem__(self, split: str) -> tuple[RawItem, ...]:
        drawn = _drawn(self._task, split)
        return tuple(RawItem(f"{split}/{i:06d}", label, _DRAWN_BYTES) for i, (_, label) in enumerate(drawn))

    def __iter__(self) -> Iterator[str]:
        return iter(world.ALL_TASKS[self._task].sizes)

    def __len__(self) -> int:
        return len(world.ALL_TASKS[self._task].sizes)


@lru_cache(maxsize=1)
def _world_checksum() -> str:
    """Sums up what decides the pictures: the code that draws them and the libraries that rasterise."""
    found = hashlib.sha256(f"{PIL.__version__} {version('matplotlib')}".encode())
    for file in sorted(Path(world.__file__).parent.glob("world*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


def embedded_dataset(task: str, name: str) -> RawDataset:
    """A task of the embedded world; DataError says which there are. Nothing is drawn until its items are looked at."""
    if task not in world.ALL_TASKS:
        raise DataError(f"there is no embedded task {task!r}; there are {', '.join(world.ALL_TASKS)}")
    about = world.ALL_TASKS[task]
    return RawDataset(
        name=name,
        layout="embedded",
        class_names=about.class_names,
        splits=_DrawnSplits(task),
        reader=EmbeddedReader(task),
        templates=(about.template,),
        split_protocol="embedded",
        content=f"{_world_checksum()} {task}",
        content_is_all=True,
    )
