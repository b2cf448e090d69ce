"""What a run would do and about how long it would take, without doing any of it: `diki-ray continual --plan`.

No cluster is started and nothing is written. Whether the library has a module of a task is known once its data are
prepared, for a module's key is made of their bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import torch

from diki_ray.clip.backbone import Backbone
from diki_ray.config import Config
from diki_ray.config.run import TaskSection
from diki_ray.data import prepare
from diki_ray.data.index import DatasetIndex
from diki_ray.data.prepare import Preparation
from diki_ray.runs.changed_data import sentence, with_former_modules
from diki_ray.runs.evaluate.cache import AnswerCache
from diki_ray.runs.plan import (
    Found,
    Plan,
    PlannedTask,
    build_method,
    device_of,
    find_data,
    is_sequential,
    make_plan,
    num_epochs_of,
)
from diki_ray.runs.speed import decoding_s, measured
from diki_ray.runs.steps import unchanged_results, with_parts_of_the_run
from diki_ray.store.caches import Cache
from diki_ray.store.run_store import RunStore

START_S = 15.0
"""A cluster of one machine and a group of workers are up in about that time, on two CPU cores."""
TASKS_MEASURED = 4
"""A few images of so many tasks are read and decoded; the others are taken to be like them."""

State = Literal["learnt", "in the library", "to learn", "to prepare and learn"]


@dataclass(frozen=True)
class TaskForecast:
    """What would become of one task."""

    name: str
    data: str
    """The folder of the prepared data set, or what it is made of."""
    num_classes: int
    num_images: dict[str, int]
    """Each split has so many images."""
    num_bytes: int
    """The images of all splits have so many bytes: their shards take about as many."""
    state: State
    learn_s: float | None
    """Seconds to learn it, its data prepared first where they are not; None where they can't be told here."""
    is_read: bool
    """Whether its whole test set is read to evaluate the run; else only the images that a new module answers."""
    note: str | None
    """What is taken over from a module of former data."""


@dataclass(frozen=True)
class Forecast:
    """What would become of a run."""

    run: str
    storage: str
    backbone: str
    method: str
    device: str
    tasks: tuple[TaskForecast, ...]
    evaluates: bool
    """False: results of the same configuration and modules are there."""
    evaluate_s: float | None
    seconds: float | None
    """The run takes so many seconds in all; None where a part of them can't be told here."""
    module_bytes: int
    """The storage grows by so many bytes, without caches."""


def forecast(config: Config, backbone: Backbone) -> Forecast:
    """Looks at the data, the storage and the speed of this machine.

    Raises:
        ConfigError, DataError: as the run itself would, before it starts anything.
    """
    config = with_parts_of_the_run(config)
    data = [(section, _indexed(found)) for section, found in find_data(config)]
    keyed = [pair for pair in data if isinstance(pair[1], DatasetIndex)]
    if is_sequential(config):  # the key of a task is made of the one before it
        keyed = list(takewhile(lambda pair: isinstance(pair[1], DatasetIndex), data))
    return _Forecaster(make_plan(config, backbone, keyed), backbone, data).forecast()


def _indexed(found: DatasetIndex | Preparation) -> DatasetIndex | Preparation:
    """The data set where it was prepared before."""
    return found if isinstance(found, DatasetIndex) else prepare.find_finished(found) or found


class _Forecaster:
    """A forecast under way. data: of all tasks; the plan has those whose keys are known."""

    def __init__(self, plan: Plan, backbone: Backbone, data: Sequence[Found]):
        self.config, self.backbone, self.data = plan.config, backbone, data
        self.method = build_method(self.config, backbone)
        self.store = RunStore.open(self.config.run.storage, self.config.run.name)
        self.plan = with_former_modules(plan, self.store)
        self.committed = {e.key for e in self.store.modules()} - {e.key for e in self.store.damaged_modules()}
        self.speed = measured(self.config, self.method)
        read = [decoding_s(found, self.method) for _, found in data[:TASKS_MEASURED]]
        self.read_s = sum(read) / len(read) / self.config.data.num_threads

    def forecast(self) -> Forecast:
        config = self.config
        planned = {task.name: number for number, task in enumerate(self.plan.tasks)}
        tasks = tuple(self._task(s, found, planned.get(s.name or _name(found))) for s, found in self.data)
        learnt = all(task.state == "learnt" for task in tasks)
        evaluates = not learnt or unchanged_results(self.plan, self.store) is None
        evaluate_s = self._evaluate_s(tasks) if evaluates else 0.0
        return Forecast(
            run=config.run.name,
            storage=self.store.objects.uri,
            backbone=self.backbone.name,
            method=config.method.name,
            device=device_of(config),
            tasks=tasks,
            evaluates=evaluates,
            evaluate_s=evaluate_s,
            seconds=_sum([START_S, evaluate_s, *(task.learn_s for task in tasks)]),
            module_bytes=sum(self._module_bytes(t.num_classes) for t in tasks if t.learn_s != 0),
        )

    def _task(self, section: TaskSection, found: DatasetIndex | Preparation, number: int | None) -> TaskForecast:
        if isinstance(found, DatasetIndex):
            images = {name: split.num_samples for name, split in found.splits.items()}
            num_bytes, data = sum(split.num_bytes for split in found.splits.values()), found.uri
            num_classes = len(found.class_names)
        else:
            chosen = found.choice.splits
            images = {name: len(items) for name, items in chosen.items()}
            num_bytes, data = sum(i.num_bytes for items in chosen.values() for i in items), section.data
            num_classes = len(found.raw.class_names)
        state, planned = self._state(found, number), None if number is None else self.plan.tasks[number]
        return TaskForecast(
            name=section.name or _name(found),
            data=data,
            num_classes=num_classes,
            num_images=images,
            num_bytes=num_bytes,
            state=state,
            learn_s=self._learn_s(images, num_classes, state, planned),
            is_read=number is None or not self._knows(number),
            note=None if planned is None else sentence(planned),
        )

    def _state(self, found: DatasetIndex | Preparation, number: int | None) -> State:
        if number is None:
            return "to learn" if isinstance(found, DatasetIndex) else "to prepare and learn"
        key = self.plan.tasks[number].key
        if key in self.committed:
            return "learnt"
        return "to learn" if self.store.find_in_library(key) is None else "in the library"

    def _knows(self, number: int) -> bool:
        return AnswerCache(self.plan, Cache.open(self.config.run.storage), number, (), "test").is_known

    def _learn_s(
        self, images: dict[str, int], num_classes: int, state: State, task: PlannedTask | None
    ) -> float | None:
        """Seconds: every epoch's steps and validation, then one pass over the training images for the statistics, or
        over those alone that came or went since the run learnt the task."""
        if state in ("learnt", "in the library"):
            return 0.0
        if self.speed is None:
            return None
        train, speed, looked_at = images["train"], self.speed, self.speed.frozen_image_s + self.read_s
        changed = None if task is None or task.former is None else task.former.difference
        seconds = looked_at * (train if changed is None else len(changed.added) + len(changed.removed))
        if speed.step_image_s:
            num_epochs = num_epochs_of(self.config, train) if task is None else task.num_epochs
            num_steps = math.ceil(train / self.config.train.batch_size)
            epoch = train * (speed.step_image_s + self.read_s) + num_steps * num_classes * speed.step_class_s
            seconds += num_epochs * (epoch + images.get("val", 0) * looked_at)
        prepared = sum(images.values()) * self.read_s if state == "to prepare and learn" else 0.0
        return prepared + seconds / self._workers(self.config.train.most_workers)

    def _evaluate_s(self, tasks: Sequence[TaskForecast]) -> float | None:
        """Seconds of the test sets that are read; with a module beside the frozen model it takes two passes."""
        if self.speed is None:
            return None
        passes = 2 if self.speed.step_image_s else 1
        image_s = passes * self.speed.frozen_image_s + self.read_s
        num_images = sum(task.num_images.get("test", 0) for task in tasks if task.is_read)
        return num_images * image_s / self._workers(self.config.evaluate.num_workers)

    def _workers(self, number: int) -> int:
        """Returns how many work at the same time: on a CPU not more than it has cores."""
        return number if device_of(self.config) == "cuda" else min(number, os.cpu_count() or 1)

    def _module_bytes(self, num_classes: int) -> int:
        """Trained numbers, one second moment and the means of the classes, all float32."""
        trained = sum(p.numel() for p in self.method.initial(torch.Generator().manual_seed(0)).values())
        return 4 * (trained + self.backbone.embed_dim**2 + num_classes * self.backbone.embed_dim)


def _name(found: DatasetIndex | Preparation) -> str:
    return found.name if isinstance(found, DatasetIndex) else found.raw.name


def _sum(seconds: Sequence[float | None]) -> float | None:
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None
