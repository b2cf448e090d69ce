"""Sources: the data sets people have, each read as a list of labelled images (`RawDataset`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diki_ray.config.protocols import CatalogueEntry, catalogue, entry_for_folder
from diki_ray.data.index import INDEX_FILE
from diki_ray.data.sources.arrays import cifar_dataset, cifar_kind, idx_dataset, is_idx
from diki_ray.data.sources.arrow import arrow_dataset, is_saved
from diki_ray.data.sources.benchmarks import benchmark_dataset, has_split_file, split_file_dataset, suits
from diki_ray.data.sources.folders import folder_dataset, manifest_dataset, manifest_in
from diki_ray.data.sources.raw import RawDataset, RawItem, Reader
from diki_ray.errors import DataError

__all__ = ["EMBEDDED", "RawDataset", "RawItem", "Reader", "benchmark_folder", "benchmark_folders", "open_source"]

EMBEDDED = "embedded:"


def open_source(
    source: str,
    *,
    name: str | None = None,
    split_protocol: str | None = None,
    class_names: Sequence[str] = (),
) -> RawDataset:
    """List a source: "embedded:<task>", a manifest, or a folder in any known layout. Nothing is decoded yet.

    `split_protocol` "coop" or "zscl" asks for a benchmark's split of a known data set (default: coop where the folder
    can have it). `class_names` names the classes of sources that number them.

    Raises DataError that says what was found and what is missing.
    """
    if source.startswith(EMBEDDED):
        from diki_ray.data.sources.embedded import embedded_dataset  # draws fonts and emblems when imported

        task = source.removeprefix(EMBEDDED)
        return embedded_dataset(task, name or task)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() in (".csv", ".jsonl"):
        return manifest_dataset(path, name or path.stem, class_names)
    if not path.is_dir():
        raise DataError(
            f"there is no data set at {source!r}: give a folder, a .csv or .jsonl manifest, or embedded:<task>"
        )
    path = path.resolve()
    if (path / INDEX_FILE).is_file():
        raise DataError(f"{path} is a prepared data set already: use it as it is")
    entry = _known(path)
    raw = _open_known(path, name, entry, split_protocol) if entry else None
    if raw is None:
        if split_protocol is not None:
            raise DataError(f"{path} is not a known data set: the {split_protocol} split is only defined for those")
        raw = _open_by_layout(path, name or path.name, class_names)
    return replace(raw, class_names=tuple(class_names)) if class_names else raw


def benchmark_folder(name: str, data: str, split: str | None = None) -> str:
    """The folder of a known data set in `data`, `~` expanded; of several, the one that has the split's files.

    Raises DataError that lists the names it may have, or says that `data` does not exist.
    """
    place = Path(data).expanduser()
    if not place.is_dir():
        raise DataError(f"there is no folder {place}: give the one that holds the data sets' folders")
    entry = catalogue()[name]
    found = [place / folder for folder in entry.folders if (place / folder).is_dir()]
    if not found:
        raise DataError(f"{place} has no folder of {name}; it may be called {', '.join(entry.folders)}")
    variant = None if split is None else entry.variants.get(split)
    return str(next((f for f in found if variant is None or suits(f, variant)), found[0]))


def benchmark_folders(names: Sequence[str], data: str, split: str | None = None) -> list[str]:
    """The folder of each of these data sets; one DataError names all that are missing."""
    found, missing = [], dict[str, None]()
    for name in names:
        try:
            found.append(benchmark_folder(name, data, split))
        except DataError as error:
            missing[str(error)] = None
    if missing:
        raise DataError("\n".join(missing))
    return found


def _known(folder: Path) -> CatalogueEntry | None:
    """Finds the entry by the split file's name, which is unambiguous, else by the folder's."""
    for entry in catalogue().values():
        coop = entry.variants.get("coop")
        if coop and "split_file" in coop.options and (folder / coop.options["split_file"]).is_file():
            return entry
    return entry_for_folder(folder.name)


def _open_known(folder: Path, name: str | None, entry: CatalogueEntry, wanted: str | None) -> RawDataset | None:
    """A known data set; None when the folder has only the name in common with it and no protocol was asked for."""
    if wanted is not None and wanted not in entry.variants:
        raise DataError(f"{entry.name} has no {wanted} split, only {', '.join(entry.variants)}")
    variant = entry.variants[wanted or next(iter(entry.variants))]
    try:
        raw = benchmark_dataset(folder, name or entry.name, variant)
    except DataError:
        if wanted is None and _is_plain(folder):
            return None
        raise
    if len(raw.class_names) == variant.num_classes:
        return raw
    counts = f"{len(raw.class_names)} classes where {entry.name} has {variant.num_classes} in the "
    if wanted is not None:
        raise DataError(f"{folder} has {counts}{wanted} protocol")
    note = f"{counts}{variant.split_protocol} protocol: not comparable with published results"
    return replace(raw, split_protocol="own", known_sizes={}, notes=(*raw.notes, note))


def _is_plain(folder: Path) -> bool:
    return not (has_split_file(folder) or is_idx(folder) or cifar_kind(folder) or (folder / "variants.txt").is_file())


def _open_by_layout(folder: Path, name: str, class_names: Sequence[str]) -> RawDataset:
    if is_saved(folder):
        return arrow_dataset(folder, name)
    if (manifest := manifest_in(folder)) is not None:
        return manifest_dataset(manifest, name, class_names)
    if is_idx(folder):
        return idx_dataset(folder, name, class_names)
    if (kind := cifar_kind(folder)) is not None:
        return cifar_dataset(folder, name, kind)
    if has_split_file(folder):
        split_file = sorted(folder.glob("split_zhou_*.json"))[0]
        return split_file_dataset(folder, name, split_file, folder, {"split_protocol": "coop"})
    return folder_dataset(folder, name)
