"""A trained task's module: statistics of its training images, features of some validation images, and where all of it
comes from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import diki_ray
from diki_ray.clip.residual import Parameters
from diki_ray.config import Config
from diki_ray.config.affects import Affects, settings
from diki_ray.config.run import TrainSection
from diki_ray.data.difference import Difference
from diki_ray.data.index import DatasetIndex
from diki_ray.learning.collective import gather_objects
from diki_ray.learning.methods import TrainingBatch
from diki_ray.learning.module import NUM_VALIDATION_FEATURES, TaskModule
from diki_ray.learning.statistics import Statistics
from diki_ray.learning.task_trainer import TaskTrainer
from diki_ray.runs.plan import PlannedTask
from diki_ray.runs.train.task_data import TaskData


def assembled(
    data: TaskData,
    trainer: TaskTrainer,
    recorded: dict[str, Any],
    num_skipped: int,
    former: TaskModule | None = None,
) -> TaskModule:
    """The module of a task whose training has ended; every rank must call it, and each gets the same module.

    recorded: what the observers add to the provenance; num_skipped: samples that could not be used, of all ranks;
    former: the task's module from before its data changed.
    """
    method, task = trainer.method, data.task
    if former is not None and task.former is not None and task.former.difference is not None:
        sums, parameters = changed_sums(data, former, task.former.difference), trainer.best
    else:
        sums, parameters = statistics(data, trainer)
    return TaskModule(
        key=task.key,
        task=task.name,
        class_names=task.class_names,
        templates=task.templates,
        method=method.name,
        parameters={name: p.cpu().numpy() for name, p in parameters.items()},
        moments=sums.moments,
        statistics=sums,
        validation_features=validation_features(data),
        provenance=_origin(data.config, task) | _course(trainer, num_skipped) | recorded,
    )


@torch.no_grad()
def statistics(data: TaskData, trainer: TaskTrainer) -> tuple[Statistics, Parameters]:
    """The sums by class of the frozen features of the training images, and what the module holds with the method's own
    sums over them. The latter are added in the order of parts, so that both are the same whoever computed which."""
    found, sums = _summed(data, trainer, partial(trainer.method.sums, trainer.best))
    return found, trainer.method.finish(trainer.best, sums)


@torch.no_grad()
def first_sums(data: TaskData, trainer: TaskTrainer) -> Parameters:
    """The method's sums over the training images before the first step, the same whoever computed which."""
    return _summed(data, trainer, partial(trainer.method.first_sums, trainer.all_parameters))[1]


OfBatch = Callable[[TrainingBatch], Parameters]
"""A method's sums over a batch."""


def _summed(data: TaskData, trainer: TaskTrainer, of_batch: OfBatch) -> tuple[Statistics, Parameters]:
    own = [_of_part(data, trainer, of_batch, part) for part in data.own_parts]
    parts = [part for parts in gather_objects(own) for part in parts]
    sums = Sums()
    for _, of_part in parts:
        sums.add(of_part)
    return Statistics.merged([found for found, _ in parts]), sums.tensors


def _of_part(data: TaskData, trainer: TaskTrainer, of_batch: OfBatch, part: int) -> tuple[Statistics, Parameters]:
    sums, numbers = Sums(), count(part, data.num_parts)  # of the canonical batches that the part has

    def add(images: Tensor, labels: Tensor, features: Tensor) -> None:
        seed = (trainer.seed * 1_000_003 + next(numbers)) % 2**63
        sums.add(of_batch(TrainingBatch(images, labels, features, trainer.class_tokens, seed)))

    return class_sums(data, part, add), sums.tensors


@torch.no_grad()
def changed_sums(data: TaskData, former: TaskModule, difference: Difference) -> Statistics:
    """The sums by class of the training images, from those of the former module and from the images that came or went:
    the same bits as from all images."""
    gone = [name for name in former.class_names if name not in data.task.class_names]
    names = (*data.task.class_names, *gone)

    def sums(index: DatasetIndex, places: np.ndarray) -> Statistics:
        found = Statistics.empty(len(names), data.backbone.embed_dim)
        to_names = torch.tensor([names.index(name) for name in index.class_names])
        for images, labels in data.chosen(index, "train", places):
            found = found.merge(sums_of_batch(data, images, to_names[labels.cpu()], len(names))[0])
        return Statistics.merged([s for part in gather_objects([found]) for s in part])

    added = sums(data.task.index, difference.added)
    removed = sums(difference.former, difference.removed)
    total = former.class_statistics.among(former.class_names, names).merge(added).minus(removed)
    return total.among(names, data.task.class_names)


def sums_of_batch(data: TaskData, images: Tensor, labels: Tensor, num_classes: int) -> tuple[Statistics, Tensor]:
    """Also the features [b, E]. A batch that is not full is filled with zeros, for an image's features differ in their
    last bit between batches of different sizes, and sums of other images can only be added to those of the same."""
    missing = data.config.train.batch_size - len(images) if len(images) else 0
    features = data.backbone.encode_image(F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)))[: len(images)]
    return Statistics.of(features.cpu(), labels.cpu(), num_classes), features


def class_sums(
    data: TaskData, part: int, on_batch: Callable[[Tensor, Tensor, Tensor], None] = lambda *batch: None
) -> Statistics:
    """The sums by class of the frozen features of a part's training images.

    on_batch: called with each batch's images [B, 3, H, W], labels [B] and frozen features [B, E].
    """
    num_classes = len(data.task.class_names)
    found = Statistics.empty(num_classes, data.backbone.embed_dim)
    for images, labels in data.part_of("train", part):
        sums, features = sums_of_batch(data, images, labels, num_classes)
        found = found.merge(sums)
        on_batch(images, labels, features)
    return found


@torch.no_grad()
def validation_features(data: TaskData) -> np.ndarray:
    """float16 [M, E] of the first validation images; the same on every rank, for M is small."""
    backbone = data.backbone
    if "val" not in data.task.index.splits:
        return np.zeros((0, backbone.embed_dim), np.float16)
    batches = data.first_images("val", NUM_VALIDATION_FEATURES)
    return np.concatenate([backbone.encode_image(images).cpu().numpy() for images in batches]).astype(np.float16)


class Sums:
    """Sums of a method's tensors over batches, float64 on the CPU."""

    def __init__(self) -> None:
        self.tensors: Parameters = {}

    def add(self, tensors: Parameters) -> None:
        for name, tensor in tensors.items():
            term = tensor.detach().to("cpu", torch.float64)
            self.tensors[name] = self.tensors[name] + term if name in self.tensors else term


def _origin(config: Config, task: PlannedTask) -> dict[str, Any]:
    """What the module was asked to be: data, settings, seed, versions."""
    index = task.index
    former = task.former
    kept = {"parameters_of": former.key} if former is not None and former.keeps_parameters else {}
    return kept | {
        "data": {"name": index.name, "digest": index.digest(), "protocol": index.split_protocol},
        "features": task.features,
        "seed": task.seed,
        "method": settings(config.method, Affects.MODULE),
        "train": _trained_under(config.train, task),
        "versions": {"diki_ray": diki_ray.__version__, "torch": torch.__version__},
    }


def _trained_under(train: TrainSection, task: PlannedTask) -> dict[str, Any]:
    """The settings that change modules, and how this one was computed."""
    changing = settings(train, Affects.MODULE)
    del changing["min_steps"]  # it is in the number of epochs
    return changing | {
        "epochs": task.num_epochs,
        "strategy": train.strategy,
        "activation_checkpointing": train.activation_checkpointing,
        "num_threads": torch.get_num_threads(),
    }


def _course(trainer: TaskTrainer, num_skipped: int) -> dict[str, Any]:
    """How training went."""
    progress = trainer.progress
    return {
        "best_epoch": progress.best_epoch if progress.history else None,
        "history": progress.history,
        "num_steps": progress.step,
        # As if every part had been a worker: who computed it is in the log, and not in a module, which is the same
        # whoever did.
        "world_sizes": [[0, trainer.num_parts]] if progress.step else [],
        "num_nonfinite_steps": trainer.num_nonfinite,
        "num_skipped": num_skipped,
    }
