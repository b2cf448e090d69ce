"""Whose word it is that a backbone may run code: stored data never has it, the caller gives it each time by name."""

from __future__ import annotations

import shlex

from diki_ray.clip.light_import import open_clip
from diki_ray.config import BackboneSection, Config
from diki_ray.config.places import LOCAL
from diki_ray.errors import ConfigError


def with_backbone(config: Config, backbone: BackboneSection) -> Config:
    """The configuration with another place of its backbone, whose precision stays."""
    precision = {"precision": config.backbone.precision}
    return config.model_copy(update={"backbone": backbone.model_copy(update=precision)})


def needs_word(backbone: BackboneSection) -> bool:
    """Whether it is anything but `embedded` or a model of open_clip's with its weights, which are read as tensors."""
    known = backbone.name == "embedded" or backbone.name in open_clip.list_models()
    return not known or backbone.directory is not None


def refuse_what_runs(backbone: BackboneSection, source: str, options: str | None = None) -> None:
    """Raises ConfigError where stored data names a Python file, or a folder, as its backbone: that is the caller's to
    say. options: what to type for it; those of the jobs by default."""
    if not needs_word(backbone):
        return
    name = backbone.name
    if name.endswith(".py"):
        what = f"the Python file {_shown(name)} as its backbone"
    elif name.startswith(LOCAL):
        what = f"the folder {_shown(name.removeprefix(LOCAL))} as its backbone"
    elif backbone.directory is not None:
        what = f"the folder {_shown(backbone.directory)} beside its backbone"
    else:
        what = f"{_shown(name)} as its backbone, which is no model of open_clip's"
    raise ConfigError(
        f"{source} names {what}, and stored data runs no code and chooses no folder here: say "
        f"{options or backbone_options(backbone)} if you trust it."
    )


def backbone_options(backbone: BackboneSection) -> str:
    """The jobs' options that name this backbone, as they are typed."""
    named = {"--backbone": backbone.name, "--pretrained": backbone.pretrained, "--directory": backbone.directory}
    return " ".join(f"{option} {_quoted(value)}" for option, value in named.items() if value is not None)


def _quoted(value: str) -> str:
    """As a shell takes it, with nothing in it that moves a terminal's cursor but a line's end."""
    if value.replace("\n", "").isprintable():
        return shlex.quote(value)
    escaped = value.encode("unicode_escape").decode().replace("'", "\\'")
    return f"$'{escaped}'"


def _shown(value: str) -> str:
    return shlex.quote(value) if value.isprintable() else ascii(value)  # other people's text, on a terminal


def named_backbone(name: str | None, pretrained: str | None, directory: str | None) -> BackboneSection | None:
    """The backbone that a caller names; None: nothing is said.

    Raises:
        ConfigError: weights or a folder, and not of what.
    """
    if name is not None:
        return BackboneSection(name=name, pretrained=pretrained, directory=directory)
    if pretrained is not None or directory is not None:
        raise ConfigError("pretrained and directory belong to a backbone that is named with them: give backbone too.")
    return None
