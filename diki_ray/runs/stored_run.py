"""A run as its storage has it, for whoever reads one after its job: no cluster, no lease."""

from __future__ import annotations

import yaml

from diki_ray.config import Config, parse
from diki_ray.errors import ConfigError
from diki_ray.report.results import DOCUMENT
from diki_ray.store.run_store import CONFIG_DOCUMENT, RunStore


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


def config_of(store: RunStore, given: Config | None = None) -> Config:
    """The configuration that is given, else the one stored with the run's results.

    Raises:
        ConfigError: none is given and none is stored.
    """
    if given is not None:
        return given
    text = store.get_document(CONFIG_DOCUMENT)
    if text is None:
        raise ConfigError(
            f"run {store.run!r} has no results/{CONFIG_DOCUMENT} yet, because it was not evaluated so far: give its "
            "configuration with --config."
        )
    return parse(yaml.safe_load(text), source=f"{CONFIG_DOCUMENT} of run {store.run!r}")


def check_backbone(store: RunStore, name: str, digest: str) -> None:
    """Raises ConfigError where the run's results were made with a backbone of other weights."""
    results = store.get_document(DOCUMENT)
    if results is not None and results["backbone"]["digest"] != digest:
        raise ConfigError(
            f"the backbone {name!r} loaded here does not have the weights that run {store.run!r} was made with "
            f"({results['backbone']['name']}): its modules mean nothing on it."
        )
