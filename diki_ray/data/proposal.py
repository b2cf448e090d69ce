"""What a folder of images is proposed to be as a task: its name, its caption's template and what is in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diki_ray.data import prepare
from diki_ray.data.index import DatasetIndex
from diki_ray.data.sources import EMBEDDED, open_source
from diki_ray.data.sources.folders import PLAIN
from diki_ray.errors import DataError
from diki_ray.store.files import scheme_of

_BY_WORD: Mapping[str, str] = {
    "pet pets dog dogs cat cats": "a photo of a {}, a type of pet.",
    "flower flowers": "a photo of a {}, a type of flower.",
    "bird birds": "a photo of a {}, a type of bird.",
    "food foods meal meals": "a photo of a {}, a type of food.",
    "car cars": "a photo of a {}, a type of car.",
    "aircraft plane planes": "a photo of a {}, a type of aircraft.",
    "texture textures": "a photo of a {} texture.",
    "satellite eurosat": "a centered satellite photo of {}.",
}
"""CLIP's own prompts, by words of a data set's name."""
_OF_NUMBERS = 'a photo of the number: "{}".'


@dataclass(frozen=True)
class Proposal:
    """A task as it may be written down."""

    data: str
    name: str
    template: str | None
    """None: the data set's own several."""
    class_names: tuple[str, ...]
    num_images: Mapping[str, int]
    """Each split has so many, once those that the source lacks are drawn."""
    layout: str
    notes: tuple[str, ...]


def data_sets_in(folder: str) -> list[str]:
    """The data sets that a folder holds: itself, or, where it has no known layout of its own and every image lies at
    least two folders deep, each of its folders."""
    path = Path(folder).expanduser()
    if folder.startswith(EMBEDDED) or scheme_of(folder) or not path.is_dir():
        return [folder]
    try:
        raw = open_source(str(path))
    except DataError:  # said where it is proposed
        return [folder]
    images = [item.ref for items in raw.splits.values() for item in items]
    if raw.layout != PLAIN or any(image.count("/") < 2 for image in images):
        return [folder]
    return [str(path / name) for name in dict.fromkeys(image.partition("/")[0] for image in images)]


def proposed(folder: str) -> Proposal:
    """Lists a data set in any layout that is read, and opens no image.

    Raises:
        DataError: it is none; says what was found and what is missing.
    """
    local = folder if folder.startswith(EMBEDDED) or scheme_of(folder) else str(Path(folder).expanduser().absolute())
    found = prepare.look(local, "prepared", settings=prepare.Settings())
    if isinstance(found, DatasetIndex):
        name, class_names, templates = found.name, found.class_names, found.templates
        sizes = {split: each.num_samples for split, each in found.splits.items()}
        layout, notes = "prepared already", tuple(found.provenance.get("notes", ()))
    else:
        name, class_names, templates = found.raw.name, found.raw.class_names, found.raw.templates
        sizes = {split: len(items) for split, items in found.choice.splits.items()}
        layout, notes = found.raw.layout, found.choice.notes
    if all(re.fullmatch(r"\d+", each) for each in class_names) and not templates:
        notes = (*notes, "the classes are numbers, which say nothing to a CLIP: rename their folders if they are not")
    template = None if len(templates) > 1 else (*templates, _template(name, class_names))[0]
    return Proposal(local, _task_name(name), template, class_names, sizes, layout, notes)


def _template(name: str, class_names: Sequence[str]) -> str:
    words = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()))
    found = next((template for known, template in _BY_WORD.items() if words & set(known.split())), None)
    numbers = all(re.fullmatch(r"\d+", each) for each in class_names)
    return found or (_OF_NUMBERS if numbers else prepare.DEFAULT_TEMPLATE)


def _task_name(name: str) -> str:
    """The name as a task may be called: it is part of paths."""
    return re.sub(r"^[^A-Za-z0-9]+", "", re.sub(r"[^A-Za-z0-9_.-]+", "_", name))[:64] or "task"
