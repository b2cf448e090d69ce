"""From a configuration and stored modules to a predictor: the one place where the two meet, for the evaluator,
`jobs/predict.py` and serving.

A run's predictor needs its storage and nothing else: no cluster, and no lease, for it only reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import Any

import torch
from PIL import Image

from diki_ray.answering.configured import COARSE_FROM_TASKS, build_predictor
from diki_ray.answering.predictor import Candidates, Predictor
from diki_ray.answering.routing import NO_TASK
from diki_ray.config import Config
from diki_ray.data.images import UndecodableImageError, decode_image
from diki_ray.data.index import read_bytes
from diki_ray.errors import ConfigError, DataError
from diki_ray.learning.methods import Method
from diki_ray.learning.module import TaskModule
from diki_ray.runs.plan import build_method, device_of, load_backbone, precision_of
from diki_ray.runs.stored_run import check_backbone, config_of, open_learnt
from diki_ray.store.run_store import RunStore

IMAGES_PER_PASS = 32


@dataclass(frozen=True)
class Answer:
    """What one image was answered with, and how it came about."""

    class_name: str
    confidence: float
    """Softmax probability among the candidate classes."""
    task: str | None
    """Whose module answered; None: the frozen model alone, or all modules together (a method that answers jointly)."""
    weight: float
    """The image's integration weight, 0 to 1."""
    log_densities: Mapping[str, float]
    """Of the image under every task's Gaussian, but for tasks that a bound ruled out; the highest is the route."""


@dataclass(frozen=True, eq=False)
class RunPredictor:
    """A run's modules, ready to answer images, each for itself (`image` routing)."""

    predictor: Predictor
    candidates: tuple[Candidates, ...]
    """All classes learnt, each data set's under its own templates."""

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(module.task for module in self.predictor.modules)

    def among(self, class_names: Sequence[str], template: str) -> RunPredictor:
        """The same modules answering among any classes whatever (open vocabulary).

        Raises:
            ConfigError: no class, an empty name, or a template without exactly one {}.
        """
        if not class_names or not all(name.strip() for name in class_names):
            raise ConfigError("the classes to choose from need at least one name, and none may be empty.")
        if template.count("{}") != 1:
            raise ConfigError(f"the template {template!r} needs exactly one {{}} where the class name goes.")
        return RunPredictor(self.predictor, (Candidates.of(self.predictor.backbone, class_names, [template]),))

    def answer(self, images: Iterable[Image.Image]) -> Iterator[Answer]:
        """An answer for each RGB image, in order; computed `IMAGES_PER_PASS` at a time, whatever shares a pass."""
        ready = map(self.predictor.backbone.preprocess, images)  # one full-size image in memory at a time
        while chunk := list(islice(ready, IMAGES_PER_PASS)):
            yield from self.answer_pixels(torch.stack(chunk))

    def answer_pixels(self, images: torch.Tensor) -> Iterator[Answer]:
        """An answer for each of one pass of preprocessed images [B, 3, H, W]."""
        predictor = self.predictor
        frozen = predictor.frozen_features(images)
        densities = predictor.log_density(frozen)
        routes = predictor.route(densities, "image")
        logits = predictor.answer_logits(images, frozen, routes, self.candidates)
        confidence, best = logits.softmax(1).max(1)
        names = [name for c in self.candidates for name in c.names]
        for n in range(len(images)):
            task, weight = int(routes.task[n]), float(routes.weight[n])
            alone = task == NO_TASK or weight < predictor.skip_weight
            yield Answer(
                class_name=names[int(best[n])],
                confidence=float(confidence[n]),
                task=None if alone else self.tasks[task],
                weight=weight,
                log_densities={t: s for t, s in zip(self.tasks, densities[n].tolist(), strict=True) if s > -inf},
            )


def read_image(path: str) -> Image.Image:
    """An image file as upright RGB, from wherever data may lie.

    Raises:
        DataError: there is none, or it cannot be decoded. StorageError: it cannot be read.
    """
    try:
        return decode_image(read_bytes(path))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except UndecodableImageError as error:
        raise DataError(f"{path} cannot be used: {error}.") from None


def load_predictor(storage: str, run: str, config: Config | None = None) -> RunPredictor:
    """The predictor over everything a run has learnt, from its storage alone.

    config: the run's own by default, which is stored with its results. Class features are computed at each image's own
    weight and not interpolated: right for a few images, slow for many.

    Raises:
        ConfigError: no such run, nothing learnt yet, no configuration, or a backbone that is not the run's.
    """
    store = open_learnt(storage, run)
    config, method = load_method(store, config)
    return predictor_over(config, method, read_modules(store))


def read_modules(store: RunStore) -> list[TaskModule]:
    """Every module that the run has learnt, verified."""
    return [TaskModule.from_bytes(store.read_module(entry.digest)) for entry in store.modules()]


def predictor_over(config: Config, method: Method, modules: Sequence[TaskModule], **tables: Any) -> RunPredictor:
    """The predictor over modules that are at hand, among all classes learnt; `tables` as for `build_predictor`.

    Raises:
        ConfigError: a module of a backbone of other dimensions.
    """
    backbone = method.backbone
    for module in modules:
        if len(module.moments.mean) != backbone.embed_dim:
            raise ConfigError(
                f"task {module.task!r} was learnt on a backbone of {len(module.moments.mean)} dimensions and "
                f"{config.backbone.name!r} has {backbone.embed_dim}: give the configuration it was learnt with."
            )
    predictor = build_predictor(config, method, modules, COARSE_FROM_TASKS, **tables)
    return RunPredictor(predictor, tuple(Candidates.of(backbone, m.class_names, m.templates) for m in modules))


def load_method(store: RunStore, config: Config | None = None) -> tuple[Config, Method]:
    """A run's configuration as it answers on this machine, with exact class features, and its method on its backbone,
    on the device.

    Raises:
        ConfigError: no configuration, or a backbone that is not the run's.
    """
    config = on_this_machine(config_of(store, config))
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"text_grid": 0})})
    backbone = load_backbone(config)
    check_backbone(store, backbone.name, backbone.digest())
    backbone.to(device_of(config), precision_of(config))
    return config, build_method(config, backbone)


def on_this_machine(config: Config) -> Config:
    """A run that was trained on GPUs answers on a machine that has none, too."""
    if config.train.device != "cuda" or torch.cuda.is_available():
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})})
