"""Which images of a source are used: splits it lacks, k-shot subsets, the order on disk, and the samples' keys.

Every choice is made by sorting hashes of (seed, purpose, image), not by a random generator: it does not depend on the
order in which files are listed, and the 8-shot subset of a seed lies within its 16-shot subset.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from diki_ray.data.shards import MAX_KEY_LENGTH
from diki_ray.data.sources.raw import RawDataset, RawItem
from diki_ray.errors import DataError

HELD_OUT_FRACTION = 0.2
"""A source without validation (or test) images gives up this share of each class's training images for them."""

MAX_VAL_SHOTS = 4
"""CoOp validates a k-shot run with min(k, 4) images a class."""


def in_drawn_order(items: Iterable[RawItem], seed: int, purpose: str) -> list[RawItem]:
    """The items in an order that depends on seed, purpose and the items, not on the order they come in."""

    def drawn(item: RawItem) -> bytes:
        return hashlib.sha256(f"{seed}\0{purpose}\0{item.ref}".encode()).digest()

    return sorted(items, key=drawn)


def _by_class(items: Iterable[RawItem]) -> list[list[RawItem]]:
    classes: dict[int, list[RawItem]] = defaultdict(list)
    for item in items:
        classes[item.label].append(item)
    return [classes[label] for label in sorted(classes)]


def hold_out(items: Sequence[RawItem], seed: int, purpose: str) -> tuple[list[RawItem], list[RawItem]]:
    """(kept, held out): 20 % of each class, rounded, at least one image of a class that has two."""
    kept: list[RawItem] = []
    held: list[RawItem] = []
    for members in _by_class(items):
        drawn = in_drawn_order(members, seed, purpose)
        count = max(1, round(HELD_OUT_FRACTION * len(drawn))) if len(drawn) > 1 else 0
        held += drawn[:count]
        kept += drawn[count:]
    return kept, held


def draw_shots(items: Sequence[RawItem], shots: int, seed: int) -> list[RawItem]:
    """`shots` images of each class, or all that there are."""
    return [item for members in _by_class(items) for item in in_drawn_order(members, seed, "shots")[:shots]]


@dataclass(frozen=True)
class Choice:
    """The images of each split in the order they are written, and what is worth saying about them."""

    splits: Mapping[str, tuple[RawItem, ...]]
    sizes_before_shots: Mapping[str, int]
    skipped: Mapping[str, int]
    notes: tuple[str, ...]


def choose(raw: RawDataset, *, shots: int | None = None, seed: int = 0) -> Choice:
    """Complete the splits, draw shots, shuffle. DataError if nothing is left to train on or a label is out of range."""
    notes = list(raw.notes)
    skipped = Counter(raw.skipped)
    splits: dict[str, list[RawItem]] = {}
    for split, items in raw.splits.items():
        _check_labels(raw, items)
        unique = {item.ref: item for item in reversed(items)}
        skipped["listed twice"] += len(items) - len(unique)
        splits[split] = list(unique.values())
    for split in ("test", "val"):
        if not splits.get(split):
            splits["train"], splits[split] = hold_out(splits.get("train", []), seed, split)
            notes.append(
                f"no {split} images of its own: {HELD_OUT_FRACTION:.0%} a class of the training images, "
                f"drawn once with seed {seed}, so that none is in both"
            )
    sizes = {split: len(items) for split, items in splits.items()}
    if not splits["train"]:
        raise DataError(f"{raw.name}: there are no training images ({raw.layout}; left out: {dict(+skipped)})")
    notes += _shared(splits)
    if shots is not None:
        splits["train"] = draw_shots(splits["train"], shots, seed)
        splits["val"] = draw_shots(splits["val"], min(shots, MAX_VAL_SHOTS), seed)
    return Choice(
        # Shuffled once here, so that reading front to back mixes classes.
        splits={s: tuple(in_drawn_order(splits[s], seed, "order")) for s in ("train", "val", "test")},
        sizes_before_shots=sizes,
        skipped=+skipped,
        notes=tuple(notes),
    )


def _check_labels(raw: RawDataset, items: Sequence[RawItem]) -> None:
    for item in items:
        if not 0 <= item.label < len(raw.class_names):
            count = len(raw.class_names)
            raise DataError(f"{raw.name}: {item.ref!r} has label {item.label}, but there are {count} classes")


def _shared(splits: Mapping[str, Sequence[RawItem]]) -> list[str]:
    found = []
    refs = {split: {item.ref for item in items} for split, items in splits.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        if shared := len(refs[a] & refs[b]):
            found.append(f"{shared} images are both in {a} and in {b}")
    return found


def keys_of(items: Sequence[RawItem]) -> list[str]:
    """A sample's key for each item: its ref without extension where that can be a key, else made so by a checksum."""
    stems = [re.sub(r"\.[^./]*$", "", item.ref).removeprefix("./") for item in items]
    taken = Counter(stems)
    keys = []
    for item, stem in zip(items, stems, strict=True):
        key = re.sub(r"[^A-Za-z0-9_/-]+", "_", stem).strip("/")
        key = re.sub(r"/+", "/", key) or "image"
        if key != stem or taken[stem] > 1 or len(key) > MAX_KEY_LENGTH:
            key = f"{key[: MAX_KEY_LENGTH - 13].rstrip('/')}-{hashlib.sha256(item.ref.encode()).hexdigest()[:12]}"
        keys.append(key)
    return keys
