"""Tasks whose data changed since the run learnt them: what of their former module the new one takes over.

Sums of features add and subtract, so those of the new module come from the former one's and from the images that came
or went, to the same bits as from all images. The trained parameters are trained anew or kept (`train.changed_data`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from diki_ray.config import Config
from diki_ray.config.affects import Affects, settings
from diki_ray.data.difference import Difference, difference
from diki_ray.data.index import DatasetIndex
from diki_ray.data.shards import BadSampleError
from diki_ray.errors import DataError, StorageError
from diki_ray.learning.methods import METHODS, Method
from diki_ray.learning.module import TaskModule, module_key
from diki_ray.runs.plan import Former, Plan, PlannedTask, device_of
from diki_ray.store.files import folders, join
from diki_ray.store.interface import ReadableRun
from diki_ray.store.log import Entry


def with_former_modules(plan: Plan, store: ReadableRun) -> Plan:
    """The plan, in which each task that the run knows from other data has its former module."""
    if METHODS[plan.config.method.name].sequential:
        return plan  # there another task's data change all that follow
    damaged = {entry.digest for entry in store.damaged_modules()}
    entries = {entry.task: entry for entry in store.modules() if entry.digest not in damaged}
    return replace(plan, tasks=tuple(_with_former(plan.config, t, entries.get(t.name), store) for t in plan.tasks))


def sentence(task: PlannedTask) -> str | None:
    """What is said of such a task; None for others."""
    if task.former is None:
        return None
    found = task.former.difference
    images = (
        "its sums are taken over all images"
        if found is None
        else f"{len(found.added)} images came and {len(found.removed)} went, and only these are read for its sums"
    )
    parameters = "; its trained parameters are kept" if task.former.keeps_parameters else ""
    return f"its data changed: {images}{parameters}"


def _with_former(config: Config, task: PlannedTask, entry: Entry | None, store: ReadableRun) -> PlannedTask:
    if entry is None or entry.key == task.key:
        return task
    keep = config.train.changed_data == "keep"
    if keep and (former := entry.metadata.get("former")) and _kept(task, Former(former, None, True)).key == entry.key:
        return replace(task, key=entry.key)  # learnt like this already
    if store.find_in_library(entry.key) != entry.digest:
        return task  # imported: what a stranger says of his images must not get into sums that other runs take up
    module = TaskModule.from_bytes(store.read_module(entry.digest))
    method, today = METHODS[config.method.name], settings(config.method, Affects.MODULE)
    if (module.method, module.provenance.get("method")) != (method.name, today):
        return task
    former = Former(
        entry.key,
        _difference(task, module) if method.sums is Method.sums and _alone(config) else None,
        keep and any(map(method.is_trained, module.parameters)),
    )
    if former.keeps_parameters:
        return _kept(task, former)
    return task if former.difference is None else replace(task, former=former)


def _alone(config: Config) -> bool:
    """Whether the bits of an image's features do not depend on its place in a batch and on its neighbours: so on a
    processor's single thread, while several threads share rows out among them."""
    return device_of(config) == "cpu" and int(config.train.cpus_per_worker) <= 1


def _kept(task: PlannedTask, former: Former) -> PlannedTask:
    """A task that is not trained: its module depends on the former one, and so does its key."""
    return replace(task, key=module_key(key=task.key, parameters_of=former.key), former=former, num_epochs=0)


def _difference(task: PlannedTask, module: TaskModule) -> Difference | None:
    """None where all images must be read: sums that cannot be added to today's, or former data that are not there."""
    about = module.provenance
    alike = about.get("features") == task.features and about["train"]["num_threads"] == 1
    if module.statistics is None or not alike or about.get("num_skipped"):
        return None
    for index in _neighbours(task.index):
        if about["data"]["digest"] in (index.digest(), replace(index, templates=module.templates).digest()):
            try:
                return difference(index, task.index)
            except (BadSampleError, StorageError):
                return None
    return None


def _neighbours(index: DatasetIndex) -> Iterator[DatasetIndex]:
    """The prepared data sets in the folder that this one is in, those of its name first."""
    parent = index.uri.rstrip("/").rpartition("/")[0]
    for name in sorted(folders(parent), key=lambda name: (not name.startswith(index.name), name)):
        try:
            yield DatasetIndex.load(join(parent, name))
        except DataError:
            continue  # no data set, or half of one
