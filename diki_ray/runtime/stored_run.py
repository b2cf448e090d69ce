"""A run as its storage has it, for whoever reads one after its job: no cluster, no lease."""

from __future__ import annotations

import argparse
import shlex

import open_clip
import yaml

from diki_ray.config import BackboneSection, Config, parse
from diki_ray.errors import ConfigError
from diki_ray.model.backbone import LOCAL
from diki_ray.runtime.results import CONFIG_DOCUMENT, DOCUMENT
from diki_ray.runtime.store import RunStore


def open_learnt(storage: str, run: str) -> RunStore:
    """The store of a run that has learnt something.

    Raises:
        ConfigError: there is no such run; says which there are.
    """
    store = RunStore.open(storage, run)
    if not store.modules():
        known = ", ".join(RunStore.runs(storage)) or "none"
        raise ConfigError(f"{storage} has no run {run!r} that has learnt anything; its runs are: {known}.")
    return store


def config_of(store: RunStore, given: Config | None = None, backbone: BackboneSection | None = None) -> Config:
    """The configuration that is given, else the one stored with the run's results.

    backbone: the caller's own word for where the backbone is, in place of the configuration's. Without it a stored
        configuration may name nothing that runs code or is a folder of this machine; and it never says which cluster
        to join, whose head would have this process unpickle what it sends.

    Raises:
        ConfigError: none is given and none is stored, or the stored one needs the caller's word.
    """
    if given is None:
        text = store.get_document(CONFIG_DOCUMENT)
        if text is None:
            raise ConfigError(
                f"run {store.run!r} has no results/{CONFIG_DOCUMENT} yet, because it was not evaluated so far: give "
                "its configuration with --config."
            )
        given = parse(yaml.safe_load(text), source=f"{CONFIG_DOCUMENT} of run {store.run!r}")
        given = given.model_copy(update={"cluster": given.cluster.model_copy(update={"address": None})})
        if backbone is None:
            refuse_what_runs(given.backbone, f"the stored configuration of run {store.run!r}")
    return given if backbone is None else with_backbone(given, backbone)


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
    return " ".join(f"{option} {_shown(value)}" for option, value in named.items() if value is not None)


def _shown(value: str) -> str:
    return shlex.quote(value) if value.isprintable() else ascii(value)  # other people's text, on a terminal


def add_backbone_options(parser: argparse.ArgumentParser) -> None:
    """The options by which a job's caller says where the backbone is; see `config_of`."""
    parser.add_argument(
        "--backbone", metavar="NAME", help="instead of the stored one; a Python file or local-dir:FOLDER only from here"
    )
    parser.add_argument("--pretrained", metavar="TAG", help="with --backbone: open_clip's tag or a file of its weights")
    parser.add_argument("--directory", metavar="FOLDER", help="with --backbone: as backbone.directory")


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


def told_config(storage: str, run: str, given: Config | None, arguments: argparse.Namespace) -> Config | None:
    """The configuration of a job's --config with the backbone of its `add_backbone_options`; with the latter alone, the
    run's own with that backbone; None: nothing is said, and the run's own will be taken as far as it may."""
    backbone = named_backbone(arguments.backbone, arguments.pretrained, arguments.directory)
    return given if backbone is None else config_of(open_learnt(storage, run), given, backbone)


def check_backbone(store: RunStore, name: str, digest: str) -> None:
    """Raises ConfigError where the run's results were made with a backbone of other weights."""
    results = store.get_document(DOCUMENT)
    if results is not None and results["backbone"]["digest"] != digest:
        raise ConfigError(
            f"the backbone {name!r} loaded here does not have the weights that run {store.run!r} was made with "
            f"({results['backbone']['name']}): its modules mean nothing on it."
        )
