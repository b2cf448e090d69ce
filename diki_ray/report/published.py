"""Which published figures a result may stand beside: those of the same protocol, and no others.

Papers mix two incompatible MTILs in one table. A run's id names its protocol, but an id is only a claim: the stream,
the split, the label space, the shots and the templates it was really made with are compared first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diki_ray.config.protocols import Protocol, PublishedResult, protocols, published

PUBLISHED_METRICS = ("transfer", "average", "last")


@dataclass(frozen=True)
class Comparison:
    """What a run can be compared with. `differences`: why it can't be, a phrase each; `rows` is empty then."""

    title: str
    differences: tuple[str, ...]
    rows: tuple[PublishedResult, ...]
    num_left_out: int
    """Published figures of the same name, but of another or an unknown split or of another routing."""
    backbone: str | None
    """The published figures' backbone, where it is not the run's."""


def compare(results: Mapping[str, Any]) -> Comparison | None:
    """Published figures beside a run's results; None when it claims no known protocol."""
    name, _, rest = results["protocol"].partition("/")
    if name not in protocols():
        return None
    protocol = protocols()[name]
    split, _, routing = rest.partition("/")
    differences = _differences(results, protocol, split)
    if differences:
        return Comparison(protocol.title, differences, (), 0, None)
    everything = published(name)
    same = tuple(p for p in everything if p.split_protocol == split and p.routing in (None, routing))
    own = "/".join(filter(None, (results["backbone"]["name"], results["config"]["backbone"]["pretrained"])))
    theirs = next((p.backbone for p in same if p.backbone != own), None)
    return Comparison(protocol.title, (), same, len(everything) - len(same), theirs)


def _differences(results: Mapping[str, Any], protocol: Protocol, split: str) -> tuple[str, ...]:
    tasks, config = results["tasks"], results["config"]
    found = []
    if [t["name"] for t in tasks] != list(protocol.order):
        found.append("its tasks are not that protocol's data sets in that order")
    splits = sorted({t["data"]["protocol"] for t in tasks} - {split})
    if splits:
        found.append(f"it has data of the split {', '.join(splits)} where its id says {split or 'none'}")
    if other := [t["name"] for t in tasks if t["data"].get("sizes_that_differ")]:
        found.append(f"{', '.join(other)}: not as many images as the published split has")
    if config["evaluate"]["label_space"] != protocol.label_space:
        found.append(f"its label space is {config['evaluate']['label_space']}, the protocol's {protocol.label_space}")
    if protocol.shots is None:
        if any(t["shots"] is not None for t in config["tasks"]):
            found.append("it trained on a few shots, the protocol on all images")
    elif any(t["num_train"] > protocol.shots * len(t["class_names"]) for t in tasks):
        found.append(f"it trained on more than {protocol.shots} images a class")
    if protocol.template is not None and any(t["templates"] != [protocol.template] for t in tasks):
        found.append(f"its templates are not all {protocol.template!r}")
    return tuple(found)
