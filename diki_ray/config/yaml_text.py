"""YAML of elsewhere as a tree of plain values: never larger than its text by more than a limit, whatever it repeats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from diki_ray.errors import ConfigError

MAX_NODES = 50_000
"""Values of a tree once its aliases (`*name`) are written out; a stream of five thousand tasks has as many."""
MAX_DEPTH = 50

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C ten times as fast, where PyYAML was built with it


def read_tree(data: bytes | str, source: str) -> dict[str, Any]:
    """The mapping in a YAML text, empty for an empty text.

    source: what the text is called in errors.

    Raises:
        ConfigError: it is not UTF-8, not YAML, no mapping, refers to itself, or is too deep or too large written out.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        _check_size(yaml.parse(text, Loader=_LOADER), source)
        tree = yaml.load(text, Loader=_LOADER)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 (byte {error.start}): save it as UTF-8.") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{source} is not a valid configuration: it is not YAML, {_brief(error)}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} is a {type(tree).__name__}; a configuration is sections with fields.")
    return tree


def _check_size(events: Iterator[yaml.Event], source: str) -> None:
    """Counts the nodes with aliases written out, from the events alone: nothing of that size is ever made."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and the count at the node's start
    count = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ConfigError(f"{source}: *{event.anchor} refers to itself, or to what comes after it.")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            open_nodes.append((event.anchor, count))
            count += 1
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = count - before
        if count > MAX_NODES or len(open_nodes) > MAX_DEPTH:
            raise ConfigError(
                f"{source} has more than {MAX_NODES:,} values or {MAX_DEPTH} levels once its aliases are written out: "
                "no configuration needs as many."
            )


def _brief(error: Exception) -> str:
    """The first line of an error, at most 200 characters of it, and where it is."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return f"{what[:200]}" + (f" (line {mark.line + 1})" if mark else "")
