"""From a YAML file with dotted overrides (`train.epochs=3`) to a configuration, and from what is wrong to sentences.

An unknown key, a wrong type or a value out of range is an error that names the field, the value and what is allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from diki_ray.config.methods import METHOD_SECTIONS
from diki_ray.config.run import Config, TaskSection
from diki_ray.config.yaml_text import read_tree
from diki_ray.errors import ConfigError
from diki_ray.regular_files import CONFIG_BYTES, read_regular

_MAX_SENTENCES = 10
_MAX_SHOWN = 200  # characters of a value
_RESOLVER = re.compile(r"\$\{.*:", re.DOTALL)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with dotted overrides applied in order.

    Raises:
        ConfigError: no such file, not YAML, an override without `=`, or a tree that is not valid.
    """
    path = Path(path)
    for override in overrides:
        if "=" not in override or override.startswith(("-", "=")):
            raise ConfigError(f"{override!r} is not an override; write section.field=value, as in train.epochs=3.")
    given = read_file(path, "the path of a YAML file, see configs/")
    try:
        tree = OmegaConf.merge(OmegaConf.create(given), OmegaConf.from_dotlist(list(overrides)))
        refuse_resolvers(OmegaConf.to_container(tree), str(path))
        plain: Any = OmegaConf.to_container(tree, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ConfigError(
            f"{path} with overrides {list(overrides)} is not a valid configuration: {first}{_index_hint(overrides)}"
        ) from error
    return parse(plain, source=str(path))


def read_file(path: Path, wanted: str) -> dict[str, Any]:
    """The tree in a YAML file.

    Raises:
        ConfigError: no such file, no regular file, too large, or no YAML; says what is `wanted` instead.
    """
    try:
        data = read_regular(path, limit=CONFIG_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--config {path}: {why}; give {wanted}.") from error
    return read_tree(data, str(path))


def refuse_resolvers(tree: Any, source: str) -> None:
    """Raises ConfigError where a value would be computed (`${oc.env:X}`, `${oc.decode:…}`): what is configured is kept
    with the results and handed on, and would take the environment's secrets with it. `${train.epochs}` is no such."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            refuse_resolvers(name, source)
            refuse_resolvers(value, f"{source}: {name}")
    elif isinstance(tree, list):
        for value in tree:
            refuse_resolvers(value, source)
    elif isinstance(tree, str) and _RESOLVER.search(tree):
        raise ConfigError(
            f"{source}: {tree!r:.200} would be computed, and configurations hold plain values, which are stored "
            'with the results; write the value itself, or give it as an override: section.field="$X".'
        )


def _index_hint(overrides: Sequence[str]) -> str:
    if not any(override.partition("=")[0].startswith("tasks") for override in overrides):
        return ""
    return "; the tasks are a list, which is changed in the file, or replaced whole: tasks=[{data: embedded:digits}]"


def parse(tree: Any, source: str = "configuration") -> Config:
    """Raises ConfigError naming every field that is wrong, its value, and what is allowed."""
    try:
        json.dumps(tree, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{source}: {error.object[max(0, error.start - 50) : error.end]!a} is no UTF-8.") from None
    except (ValueError, TypeError, RecursionError):
        pass  # no tree of text; said below
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {sentences(error, Config)}") from None


def parse_stored(tree: Any, source: str) -> Config:
    """The configuration that a run left in its storage or a bundle. A version without class statistics wrote no
    `routing`: what it made was routed by one Gaussian a task, and is answered so.

    Raises:
        ConfigError: as `parse`.
    """
    if isinstance(tree, dict) and "routing" not in tree:
        tree = tree | {"routing": {"density": "task"}}
    return parse(tree, source)


def sentences(error: ValidationError, root: type[BaseModel]) -> str:
    """What pydantic found, one sentence a field, with the fields that there are for one that there is not."""
    errors = error.errors()
    # A tuple with a bad item also counts as too short; the bad item says it all.
    outer = {e["loc"][:length] for e in errors for length in range(len(e["loc"]))}
    inner = [e for e in errors if e["loc"] not in outer]
    told = [_sentence(e, root) for e in inner[:_MAX_SENTENCES]]
    if len(inner) > _MAX_SENTENCES:
        told.append(f"and {len(inner) - _MAX_SENTENCES:,} faults more")
    return "; ".join(told)


def _sentence(error: Any, root: type[BaseModel]) -> str:
    shown_path, fields = _place(root, error["loc"])
    where = ".".join(part if part.isprintable() else ascii(part) for part in shown_path)
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such field" + (f"; there are {', '.join(fields)}" if fields else "")
    if error["type"] == "missing":
        return f"{where}: this field is needed"
    if error["type"] == "no_such_method":
        given = error["input"].get("name") if isinstance(error["input"], dict) else error["input"]
        return f"{where}.name: there is no method {_shown(given)}; there are {', '.join(METHOD_SECTIONS)}"
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"]
    shown = "" if isinstance(value, (dict, BaseModel)) else f" (it is {_shown(value)})"
    return f"{where}: {message}{shown}" if where else message


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} …"


def _place(root: type[BaseModel], location: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """The dotted path of an error as it is written in a configuration (pydantic's has the chosen method's name in it),
    and the fields of the section that its last part is in."""
    model: Any = root
    fields: list[str] = []
    path: list[str] = []
    for part in location:
        if path == ["method"] and part in METHOD_SECTIONS:
            model = METHOD_SECTIONS[part]
            continue
        path.append(str(part))
        if isinstance(part, int):
            continue
        known = getattr(model, "model_fields", {})
        fields = sorted(known)
        model = TaskSection if part == "tasks" else known[part].annotation if part in known else None
    return path, fields
