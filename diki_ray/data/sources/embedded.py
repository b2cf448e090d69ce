"""The embedded world's tasks, drawn in memory."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

from diki_ray.data import world
from diki_ray.data.sources.raw import RawDataset, RawItem
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


def embedded_dataset(task: str, name: str) -> RawDataset:
    """A task of the embedded world; DataError says which there are."""
    if task not in world.TASKS:
        raise DataError(f"there is no embedded task {task!r}; there are {', '.join(world.TASKS)}")
    about = world.TASKS[task]
    return RawDataset(
        name=name,
        layout="embedded",
        class_names=about.class_names,
        splits={
            split: tuple(
                RawItem(f"{split}/{i:06d}", label, _DRAWN_BYTES) for i, (_, label) in enumerate(_drawn(task, split))
            )
            for split in about.sizes
        },
        reader=EmbeddedReader(task),
        templates=(about.template,),
        split_protocol="embedded",
        content=f"world {world.WORLD_VERSION} {task}",
    )
