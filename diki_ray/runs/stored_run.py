"""A run as its storage has it, for whoever reads one after its job: no cluster, no lease."""

from __future__ import annotations

import argparse

from diki_ray.clip.trust import named_backbone, refuse_what_runs, with_backbone
from diki_ray.config import BackboneSection, Config, parse_stored
from diki_ray.config.run import TaskSection
from diki_ray.config.yaml_text import read_tree
from diki_ray.data.index import DatasetIndex
from diki_ray.data.prepare import Preparation, find_finished
from diki_ray.data.sources import EMBEDDED
from diki_ray.errors import ConfigError, StorageError
from diki_ray.report.results import DOCUMENT
from diki_ray.report.results_schema import check_results
from diki_ray.runs.plan import Found, find_data
from diki_ray.store.run_store import CONFIG_DOCUMENT, RunStore
from diki_ray.store.upkeep import imported_path


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
        source = f"{CONFIG_DOCUMENT} of run {store.run!r}"
        given = parse_stored(read_tree(text, source), source=source)
        given = given.model_copy(update={"cluster": given.cluster.model_copy(update={"address": None})})
        if backbone is None:
            refuse_what_runs(given.backbone, f"the stored configuration of run {store.run!r}")
    return given if backbone is None else with_backbone(given, backbone)


def find_stored_data(store: RunStore, config: Config) -> tuple[Found, ...]:
    """The data sets of a stored configuration, which are used as far as they are prepared: storage chooses no files
    that this process copies, and no folder that it writes to. Of an imported run, whose paths are those of another
    machine, no folder or file is looked at but the prepared embedded tasks.

    Raises:
        ConfigError: one that the caller has to name. DataError: one that is not there.
    """
    found: tuple[Found, ...] = ()
    unnamed = _paths_of(config) if store.objects.exists(imported_path(store.log)) else []
    if not unnamed:
        found = find_data(config)
        unnamed = [s.data for s, data in found if isinstance(data, Preparation) and find_finished(data) is None]
    if unnamed:
        raise ConfigError(
            f"the stored configuration of run {store.run!r} names data that are not prepared here, or of the machine "
            f"that it was imported from ({', '.join(unnamed)[:500]}); they are read at your own word alone: give a "
            f"configuration that names them with --config (the run's own is {store.log.folder}/results/"
            f"{CONFIG_DOCUMENT} of its storage: look at its paths first)."
        )
    return found


def _paths_of(config: Config) -> list[str]:
    """What a configuration reads beside the embedded tasks."""
    places = [task.data for task in config.tasks if not task.data.startswith(EMBEDDED)]
    return places + [str(p) for p in (config.data.sources, getattr(config.method, "reference", None)) if p is not None]


def told_config(storage: str, run: str, given: Config | None, arguments: argparse.Namespace) -> Config | None:
    """The configuration of a command's --config with the backbone of its options; with the latter alone, the
    run's own with that backbone; None: nothing is said, and the run's own will be taken as far as it may."""
    backbone = named_backbone(arguments.backbone, arguments.pretrained, arguments.directory)
    return given if backbone is None else config_of(open_learnt(storage, run), given, backbone)


def named_tasks(config: Config) -> tuple[TaskSection, ...]:
    """The configured tasks with the names that their modules have; data are looked at where no name is said."""
    if all(task.name for task in config.tasks):
        return config.tasks
    found = find_data(config)
    names = [task.name or (data.name if isinstance(data, DatasetIndex) else data.raw.name) for task, data in found]
    return tuple(task.model_copy(update={"name": name}) for (task, _), name in zip(found, names, strict=True))


def check_backbone(store: RunStore, name: str, digest: str) -> None:
    """Raises ConfigError where the run's results were made with a backbone of other weights."""
    results = store.get_document(DOCUMENT)
    if results is None:
        return
    made_with = results.get("backbone") if isinstance(results, dict) else None
    if not isinstance(made_with, dict) or not {"digest", "name"} <= made_with.keys():
        raise ConfigError(f"the results of run {store.run!r} are not what this version writes: evaluate the run again.")
    if made_with["digest"] != digest:
        raise ConfigError(
            f"the backbone {name!r} loaded here does not have the weights that run {store.run!r} was made with "
            f"({made_with['name']}): its modules mean nothing on it."
        )


def noted_text_error(store: RunStore, text_grid: int) -> float | None:
    """The largest error of an interpolated class feature that the run's evaluation found, if it had this grid and the
    modules that are stored now."""
    try:
        results = store.get_document(DOCUMENT)
        found = None if results is None else check_results(results, DOCUMENT)
    except StorageError:  # a document for people: nothing is answered from it
        return None
    if found is None or found["notes"].get("text_grid") != text_grid:
        return None
    evaluated = {task["module"]["digest"] for task in found["tasks"]}
    known = all(entry.digest in evaluated for entry in store.modules())
    return found["notes"].get("text_feature_error") if known else None
