"""Where a command works: its storage, run and configuration, from options, the environment or the default.

Nothing here imports a model or Ray: what is typed is judged before they are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

import diki_ray
from diki_ray.errors import UserError

STORAGE, RUN = "DIKI_STORAGE", "DIKI_RUN"
DEFAULT_STORAGE, DEFAULT_PREPARED = "storage", "prepared"
_FORMER_DEFAULT = "runs"
REHEARSAL = "rehearsal"
"""The folder here that fabricated data sets go to, and the one in the storage for everything else of a rehearsal."""


def storage_of(given: str | None) -> str:
    """The storage that is given, else that of DIKI_STORAGE, else `storage` here; a storage `runs`, which was the
    default before, is found where it lies."""
    former = Path(_FORMER_DEFAULT, "runs").is_dir() and not Path(DEFAULT_STORAGE).exists()
    return given or os.environ.get(STORAGE) or (_FORMER_DEFAULT if former else DEFAULT_STORAGE)


def one_run(storage: str | None, run: str | None, config: str | None) -> tuple[str, str, Any]:
    """Storage and run, and the configuration read from the file that is named, if one is.

    Raises:
        typer.BadParameter: no run is named. ConfigError: the configuration.
    """
    loaded = configured(config, (), storage, run) if config else None
    if loaded is not None:
        return loaded.run.storage, loaded.run.name, loaded
    run = run or os.environ.get(RUN)
    if not run:
        raise typer.BadParameter(f"give --run (with --storage), or --config where there is one, or set {RUN}")
    return storage_of(storage), run, None


def config_file(given: str) -> str:
    """The path of a configuration: the file, else that of ours with this name."""
    ours = Path(diki_ray.__file__).parent / "configs"
    ours = ours if ours.is_dir() else ours.parent.parent / "configs"  # a checkout: they lie beside the package
    named = ours / f"{given}.yaml"
    return str(named) if not Path(given).exists() and Path(given).name == given and named.is_file() else given


def configured(file: str, overrides: Sequence[str], storage: str | None, run: str | None) -> Any:
    """The configuration of a run, with the storage and the name that are given. Raises ConfigError."""
    from diki_ray import config

    return _placed(config.load(config_file(file), overrides), storage, run)


def told_backbone(given: Any) -> Any:
    """The backbone that a command on a stored run answers with: its option's, else its configuration's, else the
    stored one; None where there is none to be read, which the command itself says."""
    from diki_ray.config import BackboneSection, parse_stored
    from diki_ray.config.yaml_text import read_tree
    from diki_ray.store.objects import Objects
    from diki_ray.store.run_store import CONFIG_DOCUMENT

    if given.backbone is not None:
        return BackboneSection(name=given.backbone, directory=given.directory)
    if given.config is not None:
        return given.config.backbone
    try:
        text = Objects.open(given.storage).get(f"runs/{given.run}/results/{CONFIG_DOCUMENT}")
        return None if text is None else parse_stored(read_tree(text.decode(), given.run), given.run).backbone
    except (UserError, ValueError):
        return None


def configured_sweep(file: str, overrides: Sequence[str], storage: str | None) -> Any:
    """A sweep and the configuration that it varies. Raises ConfigError."""
    from diki_ray.config.sweep import load_sweep

    sweep, config = load_sweep(config_file(file), overrides)
    return sweep, _placed(config, storage, None)


def rehearsed(protocol: str, overrides: Sequence[str]) -> Any:
    """The configuration of ours for a protocol, such as mtil-1/coop, as it is rehearsed: fabricated data, the embedded
    CLIP, one epoch, everything below `rehearsal` in the storage.

    Raises:
        ConfigError: as `load`. DataError: there is no such protocol.
    """
    from diki_ray import config
    from diki_ray.config.protocols import protocol as known

    name, _, split = protocol.partition("/")
    split = split or known(name).own_split
    small = (f"protocol={name}/{split}", f"run.name={name}-{split}", "backbone={name: embedded, pretrained: null}")
    loaded = config.load(
        config_file(known(name).name.replace("-", "_")),
        [*small, "train.epochs=1", "evaluate.text_grid=2", *overrides, f"data.sources={REHEARSAL}/{split}"],
    )
    placed = _placed(loaded, None, None)
    storage = f"{placed.run.storage.rstrip('/')}/{REHEARSAL}"
    data = {} if "root" in loaded.data.model_fields_set else {"root": f"{storage}/prepared"}
    return placed.model_copy(
        update={
            "run": placed.run.model_copy(update={"storage": storage}),
            "data": placed.data.model_copy(update=data),
        }
    )


def _placed(config: Any, storage: str | None, run: str | None) -> Any:
    """The configuration where the options, else it, else the environment say."""
    update = {"name": run} if run else {}
    if storage or "storage" not in config.run.model_fields_set:
        update["storage"] = storage_of(storage)
    section = type(config.run).model_validate(config.run.model_dump() | update)
    return config.model_copy(update={"run": section})


def server_limits(arguments: Sequence[str], of_front: bool) -> dict[str, Any]:
    """The fields of a server's settings, or of its front's limits, that are written `--max-images 8`.

    Raises:
        typer.BadParameter: something else.
    """
    from diki_ray.serving.settings import Limits, Settings

    own = {"storage", "run", "token_sha256", "backbone", "pretrained", "directory"}
    fields = (Limits if of_front else Settings).model_fields
    types = {f"--{n.replace('_', '-')}": (n, type(f.default)) for n, f in fields.items() if n not in own}
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    limits: dict[str, Any] = {}
    for option, value in zip(words[::2], [*words[1::2], None][: (len(words) + 1) // 2], strict=True):
        if option not in types:
            raise typer.BadParameter(f"there is no option {option}; limits are {', '.join(types)}")
        name, kind = types[option]
        try:
            limits[name] = kind(value)
        except (TypeError, ValueError):
            raise typer.BadParameter(f"{option} needs a number (it is {value!r})") from None
    return limits
