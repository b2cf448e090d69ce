"""Sites that share no image: each makes a part of a task from its own, and the parts are merged into a module.

Class statistics are sums, so one round is enough, and the module's sums are those of all images at one place: to the
bit where the parts were made alike (one batch size, a processor's single thread, one version of torch).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import diki_ray
from diki_ray.clip.backbone import Backbone
from diki_ray.config import Config
from diki_ray.config.affects import Affects, settings
from diki_ray.errors import ConfigError, CorruptError, DataError
from diki_ray.learning.methods import METHODS
from diki_ray.learning.module import TaskModule, module_key
from diki_ray.learning.site_part import MadeWith, PartHeader, SitePart
from diki_ray.learning.statistics import Statistics
from diki_ray.runs.plan import Plan, device_of, find_data, load_backbone, make_plan, precision_of
from diki_ray.runs.stored_run import check_backbone
from diki_ray.runs.train.assembly import sums_of_batch
from diki_ray.runs.train.task_data import TaskData
from diki_ray.store.files import read_bytes
from diki_ray.store.held_here import held_here
from diki_ray.store.log import Entry
from diki_ray.store.run_store import CONFIG_DOCUMENT, RunStore

PART_BYTES = 2**30
"""What is read of a part at most; one of 10,000 classes in 1,024 dimensions has 55 MB."""


@torch.no_grad()
def make_part(
    config: Config,
    task: str | None = None,
    data: str | None = None,
    classes: Sequence[str] | None = None,
    min_count: int = 1,
    leave_out_small: bool = False,
) -> tuple[SitePart, list[str]]:
    """The part of a task that this site's training images make, and the classes that are left out of it.

    task: which of the configuration's; the only one by default. data: this site's images, in place of those that the
    configuration names. classes: what all sites have agreed on, in this order; the data set's own by default. No class
    with fewer than `min_count` images gets into the part: it is refused, or such classes are left out.

    It sets the process's number of threads to `train.cpus_per_worker`, on which the bits of features depend.

    Raises:
        ConfigError: the method trains something, or there is no such task. DataError: images of other classes, or a
            class with too few.
    """
    plan, backbone = _planned(config, task, data)
    [planned] = plan.tasks
    names = tuple(classes or planned.class_names)
    found = dict(zip(planned.class_names, planned.index.split("train").samples_per_class, strict=True))
    if len(set(names)) < len(names):
        raise DataError("--classes names a class twice.")
    if others := sorted(name for name, count in found.items() if count and name not in names):
        raise DataError(f"{planned.index.uri} has images of {_listed(others)}, which the sites have not agreed on.")
    left_out = _too_few(found, min_count, leave_out_small)
    images = TaskData(plan.config, planned, backbone)
    while True:
        sums = _sums(images, names, left_out)
        # Images that could not be read may have left a class with too few.
        more = _too_few(dict(zip(names, sums.counts.tolist(), strict=True)), min_count, leave_out_small)
        if not more:
            break
        left_out += more
    if not sums.count:
        raise DataError(f"{planned.index.uri} has no class of at least {min_count} images: there is nothing to add up.")
    header = PartHeader(
        task=planned.name,
        class_names=names,
        templates=planned.templates,
        backbone=plan.backbone_digest,  # of the weights before they are stored in another precision
        precision=str(precision_of(config)),
        data=planned.index.digest("train"),
        min_count=min_count,
        made_with=MadeWith(
            device=device_of(config),
            batch_size=config.train.batch_size,
            num_threads=torch.get_num_threads(),
            torch=torch.__version__,
            diki_ray=diki_ray.__version__,
        ),
    )
    return SitePart(header, sums), left_out


def _planned(config: Config, task: str | None, data: str | None) -> tuple[Plan, Backbone]:
    """The one task with its data, and the backbone on its device."""
    _check_method(config)
    named = [section for section in config.tasks if task in (None, section.name)]
    if len(named) != 1:
        names = ", ".join(section.name or section.data for section in config.tasks) or "none"
        raise ConfigError(f"name one task of the configuration with --task; its tasks are: {names}.")
    [section] = named
    section = section if data is None else section.model_copy(update={"data": data})
    config = config.model_copy(update={"tasks": (section,)})
    found = find_data(config)
    torch.set_num_threads(max(1, int(config.train.cpus_per_worker)))
    backbone = load_backbone(config)
    plan = make_plan(config, backbone, found)
    return plan, backbone.to(device_of(config), precision_of(config))


def _sums(data: TaskData, names: Sequence[str], left_out: Sequence[str]) -> Statistics:
    """The sums by class of the training images of the classes `names`, in that order, without some of them."""
    place = {name: number for number, name in enumerate(names) if name not in left_out}
    to_names = torch.tensor([place.get(name, -1) for name in data.task.class_names])
    total = Statistics.empty(len(names), data.backbone.embed_dim)
    for part in range(data.num_parts):
        for images, labels in data.part_of("train", part):
            chosen = to_names[labels.cpu()]
            if (chosen >= 0).any():
                total = total.merge(sums_of_batch(data, images[chosen >= 0], chosen[chosen >= 0], len(names))[0])
    return total


def _too_few(counts: Mapping[str, int], min_count: int, leave_out: bool) -> list[str]:
    """The classes with images, but fewer than the minimum; DataError where they may not be left out."""
    small = sorted(name for name, count in counts.items() if 0 < count < min_count)
    if small and not leave_out:
        raise DataError(
            f"{_listed(small)} would have fewer than {min_count} images here: a mean of so few says much about each "
            "of them. Leave such classes out (--small-classes leave-out), or agree on another --min-count."
        )
    return small


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def read_part(path: str) -> SitePart:
    """A part as it came from a site, from wherever data may lie. Nothing in it is executed.

    Raises:
        DataError: there is no such file, or it is too large. CorruptError: it is no part, or a damaged one.
    """
    try:
        blob = read_bytes(path, 0, PART_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    if len(blob) > PART_BYTES:
        raise DataError(f"{path} is refused: a site's part has at most {PART_BYTES:,} bytes.")
    try:
        return SitePart.from_bytes(blob)
    except CorruptError as error:
        raise CorruptError(f"{path} is refused: {error}") from None


def merge_parts(config: Config, parts: Sequence[tuple[str, SitePart]], min_count: int = 1) -> tuple[Entry, TaskModule]:
    """Commits the module that the parts of a task add up to, under the run and beside the configuration, so that it
    answers from there. The same parts in any order are the same module; the task's former module is replaced.

    parts: each with the name of its file, for what is said of it. min_count: what each class of a part must have.

    Raises:
        ConfigError: the parts are not of one task, backbone and precision, or not of the configuration's; a part is
            given twice, or has a class of too few images; the run has learnt with another method or backbone.
    """
    _check_method(config)
    _check_given_once(parts)
    _check_alike(parts)
    header = parts[0][1].header
    if header.task not in {section.name for section in config.tasks}:
        raise ConfigError(f"the configuration names no task {header.task!r}, which the parts are of.")
    for file, part in parts:
        if ((part.statistics.counts > 0) & (part.statistics.counts < min_count)).any():
            raise ConfigError(f"{file} has a class of fewer than {min_count} images: ask for a part without it.")
    backbone = load_backbone(config)
    if header.backbone != backbone.digest() or header.precision != str(precision_of(config)):
        raise ConfigError(
            f"the parts were made with another backbone, image preprocessing or precision than {backbone.name!r} in "
            f"{precision_of(config)}: give the configuration that the sites have."
        )
    module = _module(config, [part for _, part in parts])
    with held_here(config.run.storage, config.run.name, "diki-ray site merge", config.run.take_over) as store:
        _check_run(config, backbone)
        metadata = {"task": module.task, "num_classes": len(module.class_names), "method": module.method}
        entry = store.commit_module(module.key, module.task, module.to_bytes(), metadata | {"sites": len(parts)})
        store.put_document(CONFIG_DOCUMENT, config.to_yaml())
    return entry, module


def differences(parts: Sequence[SitePart]) -> list[str]:
    """Returns in what parts were made differently, which changes the last bits of features: the sums are then those of
    one site up to the rounding of features."""
    first = parts[0].header.made_with.model_dump()
    return [name for name in first if any(p.header.made_with.model_dump()[name] != first[name] for p in parts)]


def _check_method(config: Config) -> None:
    if METHODS[config.method.name].answering != "classes":
        raise ConfigError(
            f"method.name={config.method.name} trains on images, and sites share sums alone: set method.name=classes."
        )


def _check_given_once(parts: Sequence[tuple[str, SitePart]]) -> None:
    seen: dict[str, str] = {}
    for file, part in parts:
        for name in (part.content, part.header.data):
            if name in seen:
                raise ConfigError(f"{seen[name]} and {file} are of the same images, which would count twice: give one.")
        seen |= {part.content: file, part.header.data: file}
    if not parts:
        raise ConfigError("there is no part to merge.")


def _check_alike(parts: Sequence[tuple[str, SitePart]]) -> None:
    first_file, first = parts[0]
    for file, part in parts[1:]:
        for name in ("task", "class_names", "templates", "backbone", "precision"):
            if getattr(part.header, name) != getattr(first.header, name):
                raise ConfigError(
                    f"{first_file} and {file} differ in their {name.replace('_', ' ')}: make them again with one "
                    "configuration, and one --classes."
                )
        if part.statistics.first.shape != first.statistics.first.shape:
            raise ConfigError(f"{first_file} and {file} are of features of different dimensions.")


def _module(config: Config, parts: Sequence[SitePart]) -> TaskModule:
    """It does not depend on the order of the parts."""
    parts = sorted(parts, key=lambda part: part.content)
    header, sums = parts[0].header, Statistics.merged([part.statistics for part in parts])
    made_of = {
        "sites": [part.content for part in parts],
        "backbone": header.backbone,
        "precision": header.precision,
        "method": settings(config.method, Affects.MODULE),
    }
    named = {"task": header.task, "class_names": header.class_names, "templates": header.templates}
    return TaskModule(
        key=module_key(**made_of, **named, method_version=METHODS[config.method.name].version),
        task=header.task,
        class_names=header.class_names,
        templates=header.templates,
        method=config.method.name,
        parameters={},
        moments=sums.moments,
        # Features of single images stay where the images are.
        validation_features=torch.zeros(0, sums.first.shape[1]).numpy(),
        provenance=made_of | {"sites": [{"part": part.content} | _about(part) for part in parts]},
        statistics=sums,
    )


def _about(part: SitePart) -> dict[str, Any]:
    return part.header.model_dump(mode="json", include={"data", "made_with"}) | {"count": part.statistics.count}


def _check_run(config: Config, backbone: Backbone) -> None:
    store, digest = RunStore.open(config.run.storage, config.run.name), backbone.digest()
    check_backbone(store, backbone.name, digest)
    for entry in store.modules():
        module = TaskModule.from_bytes(store.read_module(entry.digest))
        if module.method != config.method.name or module.provenance.get("backbone", digest) != digest:
            raise ConfigError(
                f"run {store.run!r} has learnt {entry.task!r} with another method or backbone: give another --run."
            )
