"""What a prepared data set lacks: against the published split, and of its own images."""

from __future__ import annotations

from collections.abc import Mapping

from diki_ray.data.index import DatasetIndex
from diki_ray.data.sources import RawDataset
from diki_ray.data.sources.choice import Choice

MAX_NAMES = 20
"""So many classes without images are named; more would hide the line before them."""


def differing_sizes(raw: RawDataset, choice: Choice, unusable: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """For each split that has not its published number of usable images {"found", "published"}, before shots are drawn.

    unusable: by split the images that could not be read or decoded.
    """
    found = {split: size - unusable.get(split, 0) for split, size in choice.sizes_before_shots.items()}
    if raw.known_sizes and "val" not in raw.known_sizes:
        found["train"] += found.pop("val")  # published without validation
    return {
        split: {"found": found.get(split, 0), "published": size}
        for split, size in raw.known_sizes.items()
        if found.get(split, 0) != size
    }


def is_incomplete(index: DatasetIndex) -> bool:
    """Whether any split has fewer images than the published one."""
    return any(s["found"] < s["published"] for s in index.provenance.get("sizes_that_differ", {}).values())


def shortcomings(index: DatasetIndex) -> list[str]:
    """What this data set lacks, a phrase each; empty for a whole one."""
    about = index.provenance
    found = [
        f"{_counted(index, split, sizes['found'])} images, the published split {sizes['published']:,}"
        for split, sizes in about.get("sizes_that_differ", {}).items()
    ]
    found += [f"left out: {count} × {reason}" for reason, count in about.get("left_out", {}).items()]
    for split in index.splits.values():
        pairs = zip(index.class_names, split.samples_per_class, strict=True)
        lost = [name for name, count in pairs if not count]
        if lost and split.num_samples:
            names = ", ".join(lost[:MAX_NAMES]) + (" …" if len(lost) > MAX_NAMES else "")
            found.append(f"{len(lost)} classes have no {split.name} image: {names}")
    return found


def _counted(index: DatasetIndex, split: str, found: int) -> str:
    """The number that was compared with the published one; what it is of, where the prepared split has another."""
    if split not in index.splits or found == index.splits[split].num_samples:
        return f"{split} has {found:,}"
    if index.provenance.get("settings", {}).get("shots") is not None:
        return f"{split}, before shots were drawn, has {found:,}"
    return f"{split} and val together have {found:,}"
