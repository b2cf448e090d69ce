"""Fills in the class means of modules that a former version made: one pass over their training images, no training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from diki_ray.config import Config
from diki_ray.errors import ConfigError
from diki_ray.learning.module import TaskModule
from diki_ray.learning.statistics import Statistics
from diki_ray.runs.plan import PlannedTask, device_of, find_data, load_backbone, make_plan, precision_of
from diki_ray.runs.stored_run import check_backbone, find_stored_data
from diki_ray.runs.train.assembly import class_sums
from diki_ray.runs.train.task_data import TaskData
from diki_ray.store.run_store import RunStore


@torch.no_grad()
def fill_class_means(
    store: RunStore,
    epoch: int,
    config: Config,
    on_task: Callable[[str], None] = lambda task: None,
    named_data: bool = True,
) -> list[str]:
    """Gives each module of a run that lacks them its sums by class, and returns the names of these tasks. The prompts,
    the key and everything else of a module stay. What is filled in is committed task by task, so a second call goes on.

    config: the one the run was learnt with. on_task: called with the name of each task before its images are read.
    named_data: as `evaluate_stored` has it.

    Raises:
        ConfigError: the backbone or a task's data are not those of the run. DataError: images cannot be read.
    """
    lacking = {
        entry.task: module
        for entry in store.modules()
        if (module := TaskModule.from_bytes(store.read_module(entry.digest))).statistics is None
    }
    if not lacking:
        return []
    found = find_data(config) if named_data else find_stored_data(store, config)
    backbone = load_backbone(config)
    plan = make_plan(config, backbone, found)
    check_backbone(store, backbone.name, plan.backbone_digest)
    backbone.to(device_of(config), precision_of(config))
    for name, module in lacking.items():
        on_task(name)
        task = next((t for t in plan.tasks if t.name == name), None)
        _check(name, module, task)
        assert task is not None
        data = TaskData(plan.config, task, backbone)
        sums = Statistics.merged([class_sums(data, part) for part in range(data.num_parts)])
        filled = replace(module, moments=sums.moments, statistics=sums)
        metadata = next(entry.metadata for entry in store.modules() if entry.task == name)
        store.replace_module(epoch, module.key, name, filled.to_bytes(), metadata)
    return list(lacking)


def _check(name: str, module: TaskModule, task: PlannedTask | None) -> None:
    if task is None:
        raise ConfigError(f"the configuration has no task {name!r}, whose images are needed: give it with --config.")
    trained_on = module.provenance.get("data", {}).get("digest")
    if task.class_names != module.class_names or trained_on not in (None, task.index.digest()):
        raise ConfigError(
            f"task {name!r}: the data at {task.index.uri} are not those that its module was learnt from; give the "
            "configuration it was learnt with."
        )
