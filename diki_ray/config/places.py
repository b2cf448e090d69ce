"""Where the files are that a configuration names, in full."""

from __future__ import annotations

import os
from functools import partial

from diki_ray.config.run import Config

LOCAL = "local-dir:"
"""What the name of a backbone begins with that is a folder."""


def with_absolute_paths(config: Config, folder: str = "") -> Config:
    """The configuration for processes that run in folders of their own; paths are from `folder`, by default this
    process's own."""
    full = partial(absolute, folder=folder)
    tree = config.model_dump()
    tree["run"]["storage"] = full(config.run.storage)
    tree["data"]["root"] = full(config.data.root)
    if config.data.sources is not None:
        tree["data"]["sources"] = full(config.data.sources)
    name = config.backbone.name
    if name.endswith(".py"):
        tree["backbone"]["name"] = full(name)
    elif name.startswith(LOCAL):
        tree["backbone"]["name"] = LOCAL + full(name.removeprefix(LOCAL))
    for field in ("pretrained", "directory"):
        value = tree["backbone"][field]
        if value is not None and os.path.exists(full(value)):
            tree["backbone"][field] = full(value)
    if tree["method"].get("reference") is not None:
        tree["method"]["reference"] = full(tree["method"]["reference"])
    for task in tree["tasks"]:
        task["data"] = full(task["data"])
    return Config.model_validate(tree)


def absolute(place: str, folder: str = "") -> str:
    """A local path in full, `~` included; a URL or `embedded:NAME` as it is."""
    if "://" in place or place.startswith("embedded:"):
        return place
    return os.path.abspath(os.path.join(folder, os.path.expanduser(place)))
