"""The catalogue: benchmark protocols, the data sets they are made of, and what others published on them.

All of it is data in `catalogue/`: an order, a template or a class name is corrected there, never in code. A result is
comparable with another only under the same full id, `<protocol>/<split protocol>/<routing>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from diki_ray.errors import DataError

BENCHMARK_SPLITS = ("coop", "zscl")
ROUTINGS = ("batch", "image")
LABEL_SPACES = ("task", "seen", "all")
ZERO_SHOT = "zero-shot, published"
"""The name of the published row of the backbone alone; it has no routing."""
EMBEDDED = "embedded"
"""The split protocol of what the embedded world draws."""
_NOT_DATASETS = ("protocols.json", "published.json", "embedded.json")


@dataclass(frozen=True)
class Protocol:
    """A benchmark: which data sets in which order, how many images of each, and among which classes it is answered.

    `shots` None: all training images. `template` None: each data set its own, else this one for all. `label_space`:
    "task" (the classes of the set under test), "seen" (all learnt so far) or "all" (of every set, learnt or not).
    `own_split` is the split protocol of the paper that introduced it; `embedded`: its data sets are drawn. `held_out`
    is the data set, the last one, that tells what the others teach of a domain never seen.
    """

    name: str
    title: str
    order: tuple[str, ...]
    shots: int | None
    label_space: str
    template: str | None
    own_split: str
    held_out: str | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The split protocols that it can be run on."""
        return (EMBEDDED,) if self.own_split == EMBEDDED else BENCHMARK_SPLITS

    def full_id(self, split_protocol: str, routing: str) -> str:
        """The id that goes into a result; DataError for an unknown split protocol or routing."""
        if split_protocol not in self.splits or routing not in ROUTINGS:
            raise DataError(
                f"protocol {self.name}: split protocol {split_protocol!r} is one of {self.splits} and "
                f"routing {routing!r} one of {ROUTINGS}"
            )
        return f"{self.name}/{split_protocol}/{routing}"


@dataclass(frozen=True)
class Variant:
    """A data set under one split protocol.

    `layout` names the reader (diki_ray.data.sources) and `options` holds what that reader needs. `class_names` is
    empty where the files themselves have them. `known_sizes` are the published numbers of images by split, where known.
    """

    split_protocol: str
    layout: str
    templates: tuple[str, ...]
    num_classes: int
    class_names: tuple[str, ...]
    known_sizes: Mapping[str, int]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class CatalogueEntry:
    """A known data set: its name in tables, the names its folder goes by, and its variants by split protocol."""

    name: str
    folders: tuple[str, ...]
    variants: Mapping[str, Variant]


def _read(file: str) -> Any:
    return json.loads((files("diki_ray.config") / "catalogue" / file).read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def protocols() -> Mapping[str, Protocol]:
    """All benchmarks by name."""
    return _protocols("protocols.json")


@lru_cache(maxsize=1)
def embedded_protocols() -> Mapping[str, Protocol]:
    """Returns the protocols whose data sets are drawn, by name."""
    return _protocols("embedded.json")


def held_out_of(protocol_id: str) -> str | None:
    """The data set that the protocol of an id keeps away until the end; None where it keeps none away."""
    known = embedded_protocols().get(protocol_id.partition("/")[0])
    return None if known is None else known.held_out


def _protocols(file: str) -> Mapping[str, Protocol]:
    return {
        name: Protocol(name=name, **{**fields, "order": tuple(fields["order"])}) for name, fields in _read(file).items()
    }


def protocol(name: str) -> Protocol:
    """The protocol of that name; DataError says which there are."""
    known = {**protocols(), **embedded_protocols()}
    if name not in known:
        raise DataError(f"there is no protocol {name!r}; known are {', '.join(known)}")
    return known[name]


@lru_cache(maxsize=1)
def catalogue() -> Mapping[str, CatalogueEntry]:
    """All known data sets by their name in tables."""
    entries = {}
    for file in sorted(f.name for f in (files("diki_ray.config") / "catalogue").iterdir()):
        if not file.endswith(".json") or file in _NOT_DATASETS:
            continue
        fields = _read(file)
        name, folders = fields.pop("name"), tuple(fields.pop("folders"))
        entries[name] = CatalogueEntry(name, folders, {split: _variant(split, v) for split, v in fields.items()})
    return entries


def _variant(split_protocol: str, fields: dict[str, Any]) -> Variant:
    return Variant(
        split_protocol=split_protocol,
        layout=fields.pop("layout"),
        templates=tuple(fields.pop("templates")),
        num_classes=fields.pop("num_classes"),
        class_names=tuple(fields.pop("class_names", ())),
        known_sizes=fields.pop("known_sizes", {}),
        options=fields,
    )


def entry_for_folder(folder_name: str) -> CatalogueEntry | None:
    """The known data set whose folder goes by that name, if any."""
    for entry in catalogue().values():
        if folder_name.lower() in (f.lower() for f in entry.folders):
            return entry
    return None


@dataclass(frozen=True)
class PublishedResult:
    """What a paper reports, in %. `per_dataset` follows the protocol's order; `routing` is None where none is said."""

    method: str
    backbone: str
    split_protocol: str | None
    routing: str | None
    transfer: float | None
    average: float | None
    last: float | None
    per_dataset: Mapping[str, tuple[float | None, ...]]
    source: str


def published(protocol_name: str) -> tuple[PublishedResult, ...]:
    """Published results of a protocol, zero-shot first, whatever their split; empty where none are kept."""
    content = _read("published.json")
    found = []
    for method, metrics in content["protocols"].get(protocol_name, {}).get("methods", {}).items():
        # "DIKI (rerun by DPW's authors)" has DIKI's split; its routing is not said, unlike that of DIKI's own figures.
        split = content["splits"].get(method.partition(" (")[0])
        means = {name: metrics[name]["mean"] if name in metrics else None for name in ("transfer", "average", "last")}
        found.append(
            PublishedResult(
                method=method,
                backbone=content["backbone"],
                split_protocol=split,
                routing="batch" if method == "DIKI" else None,
                per_dataset={name: tuple(m["per_dataset"]) for name, m in metrics.items() if "per_dataset" in m},
                source=content["source"],
                **means,
            )
        )
    if means := content["zero_shot"].get(protocol_name):
        zero_shot = PublishedResult(
            ZERO_SHOT,
            content["backbone"],
            content["zero_shot"]["split"],
            None,
            **means,
            per_dataset={},
            source=content["source"],
        )
        found.insert(0, zero_shot)
    return tuple(found)
