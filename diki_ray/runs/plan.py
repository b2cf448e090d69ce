"""What a configuration asks for, as values: the tasks of the stream, the key of each module, what is still to train.

Pure but for reading the data sets' indexes; decided before any cluster is touched.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from diki_ray.clip import backbone as backbones
from diki_ray.clip.backbone import Backbone
from diki_ray.config import Config
from diki_ray.config.affects import Affects, settings
from diki_ray.config.places import absolute
from diki_ray.config.protocols import protocol
from diki_ray.config.run import TaskSection
from diki_ray.data import prepare
from diki_ray.data.difference import Difference
from diki_ray.data.index import DatasetIndex
from diki_ray.data.prepare import Preparation
from diki_ray.data.sources import benchmark_folders
from diki_ray.errors import ConfigError, DataError
from diki_ray.learning.methods import METHODS, Method
from diki_ray.learning.methods.from_reference import FromReference
from diki_ray.learning.module import module_key, task_seed
from diki_ray.learning.task_trainer import Recipe
from diki_ray.runs.reference import reference_digest, reference_of


@dataclass(frozen=True)
class Former:
    """The module that the run has of a task since before its data changed (runs/changed_data.py)."""

    key: str
    difference: Difference | None
    """Where its sums are taken over: what is added to them and taken out."""
    keeps_parameters: bool
    """Its trained parameters are the new module's, too."""


@dataclass(frozen=True)
class PlannedTask:
    """One task, resolved: its data, what its module's key is made of, and its seed."""

    name: str
    index: DatasetIndex
    templates: tuple[str, ...]
    """The first trains; all of them, averaged, answer (the zscl protocol's ensembles)."""
    num_epochs: int
    seed: int
    key: str
    predecessor: str | None
    """The key of the module it starts from, where the method's tasks depend on the earlier ones."""
    features: str = ""
    """What decides the bits of the frozen features of its images: equal for tasks whose sums may be added."""
    former: Former | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.index.class_names

    @property
    def num_images_trained(self) -> int:
        """Over all epochs."""
        return self.num_epochs * self.index.split("train").num_samples


@dataclass(frozen=True)
class Plan:
    """The stream in order, on one backbone."""

    config: Config
    backbone_digest: str
    embed_dim: int
    tasks: tuple[PlannedTask, ...]

    def pending(self, committed: Collection[str]) -> list[PlannedTask]:
        """The tasks whose module keys are not among those committed, in stream order."""
        return [task for task in self.tasks if task.key not in committed]

    def in_order(self, order: Sequence[int]) -> Plan:
        """The stream with its tasks in another order: the same modules, or, where they build on each other, others."""
        tasks: list[PlannedTask] = []
        for t in (self.tasks[n] for n in order):
            tasks.append(_planned(self.config, self.backbone_digest, t.name, t.index, t.templates, tasks))
        return replace(self, tasks=tuple(tasks))

    def few_images(self) -> str | None:
        """A sentence for people where a Gaussian that routes comes, unshrunk, from fewer images than dimensions."""
        gaussians_route = (
            self.config.routing.density == "task" and METHODS[self.config.method.name].answering == "routed"
        )
        if self.config.statistics.shrinkage != "none" or not gaussians_route:
            return None
        few = [t.name for t in self.tasks if t.index.split("train").num_samples <= self.embed_dim]
        if not few:
            return None
        return (
            f"{', '.join(few)}: no more training images than the {self.embed_dim} dimensions of their features, so "
            "their densities fit no other image and modules are hardly let in. Set statistics.shrinkage=oas; it trains "
            "nothing anew"
        )


def device_of(config: Config) -> str:
    """`cuda` or `cpu`, as configured; `auto` asks this process's machine. On a cluster whose driver has no GPU,
    configure `cuda`."""
    if config.train.device != "auto":
        return config.train.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def precision_of(config: Config) -> torch.dtype:
    """Returns the precision of the frozen weights: as configured, `auto` by device."""
    precision = config.backbone.precision
    if precision == "auto":
        precision = "bfloat16" if device_of(config) == "cuda" else "float32"
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def load_backbone(config: Config) -> Backbone:
    """On the CPU in float32; the caller moves it."""
    b = config.backbone
    return backbones.load(b.name, b.pretrained, b.directory)


def build_method(config: Config, backbone: Backbone) -> Method:
    settings = fitted(config, backbone).method.model_dump(exclude={"name", "reference", "num_reference", "replay"})
    method = METHODS[config.method.name](backbone, **settings)
    if isinstance(method, FromReference):
        method.reference = partial(reference_of, config, backbone)
    return method


def fitted(config: Config, backbone: Backbone) -> Config:
    """The configuration with depths that nobody wrote down lowered to the blocks that the backbone's towers have.

    A depth that is written down stays, and is refused where a tower is lower.
    """
    method, lowered = config.method, dict[str, int]()
    for tower in backbone.towers:
        name = f"{tower.name}_depth"
        depth = getattr(method, name, None)
        if depth is not None and name not in method.model_fields_set and depth > tower.num_blocks:
            lowered[name] = tower.num_blocks
    return config.model_copy(update={"method": method.model_copy(update=lowered)}) if lowered else config


def is_sequential(config: Config) -> bool:
    """Whether the modules of another order of the tasks are other modules."""
    return METHODS[config.method.name].sequential


def recipe_of(config: Config) -> Recipe:
    t = config.train
    return Recipe(t.optimizer, t.lr, t.final_lr_fraction, t.weight_decay, t.max_nonfinite_steps)


def tasks_of(config: Config) -> tuple[TaskSection, ...]:
    """The configured tasks, or those of the protocol."""
    if config.tasks or config.protocol == "own":
        return config.tasks
    name, _, split = config.protocol.partition("/")
    known = protocol(name)
    common = {"template": known.template, "shots": known.shots}
    if config.data.sources is None:
        folders = [f"embedded:{dataset}" for dataset in known.order]
    else:
        folders = benchmark_folders(known.order, config.data.sources, split)
        common["split"] = split
    return tuple(
        TaskSection.model_validate(common | {"data": folder, "name": dataset})
        for dataset, folder in zip(known.order, folders, strict=True)
    )


def shared_by_keys(config: Config, backbone_digest: str) -> dict[str, Any]:
    """What the module keys of all tasks have in common: every setting that changes modules, but for the tasks' own.

    Files are in it by what they hold, and the device by the precision that follows from it. The names and the nesting
    are those that the keys of stored modules were made with.
    """
    changing = settings(config, Affects.MODULE)
    del changing["tasks"], changing["backbone"]
    run, train, method = changing.pop("run"), changing.pop("train"), changing.pop("method")
    if "reference" in method:
        method["reference"] = reference_digest(config)
    del train["device"]
    recipe = asdict(recipe_of(config))
    others = {section: fields for section, fields in changing.items() if fields}
    return (
        others
        | run
        | {name: value for name, value in train.items() if name not in recipe}
        | {
            "backbone": backbone_digest,
            "precision": str(precision_of(config)),
            "method": method,
            "method_version": METHODS[config.method.name].version,
            "recipe": recipe,
        }
    )


Found = tuple[TaskSection, DatasetIndex | Preparation]


def find_data(config: Config) -> tuple[Found, ...]:
    """Looks for the data of all tasks and writes nothing; one DataError says all that is missing."""
    found, missing = [], []
    for section in tasks_of(config):
        try:
            data = prepare.look(
                absolute(section.data),  # workers run in folders of their own
                absolute(config.data.root),
                name=section.name,
                template=section.template,
                split_protocol=section.split,
                settings=prepare.Settings(section.shots, config.run.seed),
            )
        except DataError as error:
            missing.append(str(error))
        else:
            found.append((section, data))
    if missing:
        raise DataError("\n".join(missing))
    return tuple(found)


def plan_of(config: Config) -> Plan:
    """`make_plan` on the configured backbone, whose weights can take minutes: data is looked for before them."""
    data = find_data(config)
    return make_plan(config, load_backbone(config), data)


def make_plan(config: Config, backbone: Backbone, data: Sequence[Found] | None = None) -> Plan:
    """Prepares or loads every data set's index and derives the module keys.

    data: of `find_data`, where it was looked for already.

    Raises:
        ConfigError, DataError: two tasks of one name, data that is missing or not valid.
    """
    # Depths that the backbone does not have and missing reference data are refused before anything is prepared.
    config = fitted(config, backbone)
    build_method(config, backbone)
    reference_digest(config)
    digest = backbone.digest()
    tasks: list[PlannedTask] = []
    for section, found in find_data(config) if data is None else data:
        index = found if isinstance(found, DatasetIndex) else prepare.made(found)
        name = section.name or index.name
        if name in (t.name for t in tasks):
            raise ConfigError(f"tasks: two tasks are named {name!r}; give one of them another name.")
        templates = (section.template,) if section.template else index.templates
        tasks.append(_planned(config, digest, name, index, templates, tasks))
    return Plan(config, digest, backbone.embed_dim, tuple(tasks))


def num_epochs_of(config: Config, num_images: int) -> int:
    """A task of so many training images has these epochs: more than `train.epochs` where that is below `min_steps`."""
    steps_an_epoch = math.ceil(num_images / config.train.batch_size)
    return max(config.train.epochs, math.ceil(config.train.min_steps / steps_an_epoch))


def _planned(
    config: Config,
    backbone_digest: str,
    name: str,
    index: DatasetIndex,
    templates: tuple[str, ...],
    earlier: Sequence[PlannedTask],
) -> PlannedTask:
    predecessor = earlier[-1].key if is_sequential(config) and earlier else None
    data_digest = index.digest(*(s for s in ("train", "val") if s in index.splits))
    num_epochs = num_epochs_of(config, index.split("train").num_samples)
    depends_on = shared_by_keys(config, backbone_digest) | {
        "data": data_digest,
        "class_names": index.class_names,
        "template": templates[0],
        "epochs": num_epochs,
        "predecessor": predecessor,
    }
    del depends_on["min_steps"]  # it is in the number of epochs
    features = module_key(
        backbone=backbone_digest,
        precision=str(precision_of(config)),
        device=device_of(config),
        batch_size=config.train.batch_size,
    )
    seed = task_seed(config.run.seed, data_digest)
    key = module_key(**depends_on)
    return PlannedTask(name, index, templates, num_epochs, seed, key, predecessor, features)
