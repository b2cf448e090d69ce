"""From a YAML file with dotted overrides (`train.epochs=3`) to a configuration, and from what is wrong to sentences.

An unknown key, a wrong type or a value out of range is an error that names the field, the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from diki_ray.config.methods import METHOD_SECTIONS
from diki_ray.config.run import Config, TaskSection
from diki_ray.errors import ConfigError


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with dotted overrides applied in order.

    Raises:
        ConfigError: no such file, not YAML, an override without `=`, or a tree that is not valid.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; give the path of a YAML file, see configs/.") from error
    for override in overrides:
        if "=" not in override or override.startswith(("-", "=")):
            raise ConfigError(f"{override!r} is not an override; write section.field=value, as in train.epochs=3.")
    try:
        tree = OmegaConf.merge(OmegaConf.create(yaml.safe_load(text) or {}), OmegaConf.from_dotlist(list(overrides)))
        plain: Any = OmegaConf.to_container(tree, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{path} with overrides {list(overrides)} is not a valid configuration: {first}") from error
    return parse(plain, source=str(path))


def parse(tree: Any, source: str = "configuration") -> Config:
    """Raises ConfigError naming every field that is wrong, its value, and what is allowed."""
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
    inner = [e for e in errors if not any(o["loc"][: len(e["loc"])] == e["loc"] for o in errors if o is not e)]
    return "; ".join(_sentence(e, root) for e in inner)


def _sentence(error: Any, root: type[BaseModel]) -> str:
    shown_path, fields = _place(root, error["loc"])
    where = ".".join(shown_path)
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such field" + (f"; there are {', '.join(fields)}" if fields else "")
    if error["type"] == "missing":
        return f"{where}: this field is needed"
    if error["type"] == "no_such_method":
        given = error["input"].get("name") if isinstance(error["input"], dict) else error["input"]
        return f"{where}.name: there is no method {given!r}; there are {', '.join(METHOD_SECTIONS)}"
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"]
    shown = "" if isinstance(value, (dict, BaseModel)) else f" (it is {value!r})"
    return f"{where}: {message}{shown}" if where else message


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
