"""Builds the predictor that a configuration asks for over modules that are at hand: only here do the two meet."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diki_ray.answering.class_features import ClassFeatures, Exact, Tabulated
from diki_ray.answering.class_head import ClassHead, ClassModels, ClassRouter
from diki_ray.answering.coarse import CoarseGaussians
from diki_ray.answering.gaussians import Gaussians
from diki_ray.answering.predictor import Predictor
from diki_ray.answering.routing import ROUTED, Calibration, GaussianRouter, Published, Router, Validated
from diki_ray.config import Config
from diki_ray.errors import ConfigError
from diki_ray.learning.methods import METHODS, Method
from diki_ray.learning.module import TaskModule

COARSE_FROM_TASKS = 64
"""From this many on, a run's predictor rules tasks out by a bound before it computes densities (coarse.py)."""

TABLE_BYTES = 2**30
"""Class features that an evaluation keeps; it scores the images of one module after those of another."""


def build_predictor(
    config: Config,
    method: Method,
    modules: Sequence[TaskModule],
    class_features: ClassFeatures | None = None,
    coarse_from: int | None = None,
    former: Predictor | None = None,
) -> Predictor:
    """Returns the predictor over these modules, in their order.

    class_features: where class features come from; by default as an evaluation under this configuration needs them.
    coarse_from: with so many modules or more, on a CPU, only the densities that decide an image's route are computed,
        and the others are minus infinity; every density by default, as tables of answers need them.
    former: the predictor over other modules under this configuration, whose class models these ones' begin from.

    Raises:
        ConfigError: the calibration needs what a module does not have.
    """
    known = None if former is None else former.router
    router = build_router(config, method.backbone.embed_dim, modules, method.backbone.device, coarse_from, known)
    return Predictor(
        method,
        modules,
        router,
        build_class_features(config) if class_features is None else class_features,
        skip_weight=config.evaluate.skip_weight,
        head=build_head(config, router),
    )


def build_head(config: Config, router: Router) -> ClassHead | None:
    """The class model as it answers, alone or beside the modules; None where the modules answer without it."""
    if not isinstance(router, ClassRouter):
        return None
    if METHODS[config.method.name].answering == "classes":
        return ClassHead(router.models, None)
    beside = config.class_model.beside_modules
    return ClassHead(router.models, beside) if beside else None


def answers_by_set(config: Config) -> bool:
    """Whether an image's answer depends on all tasks that are learnt, and not only on the one it is routed to."""
    answering = METHODS[config.method.name].answering
    has_head = answering == "classes" or config.class_model.beside_modules > 0
    return answering == "joint" or (routes_by_classes(config) and has_head)


def routes_by_classes(config: Config) -> bool:
    """Whether the class model tells the task of an image."""
    return config.routing.density == "classes" and METHODS[config.method.name].answering in ROUTED


def build_class_features(config: Config) -> ClassFeatures:
    """Returns what an evaluation needs: tables where each image has a weight of its own. Under `batch` routing all
    images of a batch share one text weight, and one exact text pass answers them."""
    evaluate = config.evaluate
    if not evaluate.text_grid or evaluate.routing == "batch":
        return Exact()
    return Tabulated(evaluate.text_grid, TABLE_BYTES)


def build_router(
    config: Config,
    embed_dim: int,
    modules: Sequence[TaskModule],
    device: str | torch.device = "cpu",
    coarse_from: int | None = None,
    former: Router | None = None,
) -> Router:
    """Returns the router over the densities of these modules' tasks, as `build_predictor` says. It needs no backbone.

    Raises:
        ConfigError: also where the class model routes and a module has no class means.
    """
    if routes_by_classes(config):
        known = former.models if isinstance(former, ClassRouter) else None
        return ClassRouter(ClassModels(modules, config.class_model, known, device))
    statistics = config.statistics
    if not modules:
        return GaussianRouter(None, build_calibration(config, embed_dim, None, modules))
    gaussians = Gaussians([m.moments for m in modules], statistics.covariance_eps, statistics.shrinkage)
    gaussians.to(device)
    # A card computes all densities in less time than it takes to ask it which are needed.
    many = coarse_from is not None and len(gaussians) >= coarse_from and torch.device(device).type == "cpu"
    coarse = CoarseGaussians(gaussians) if many else None
    return GaussianRouter(gaussians, build_calibration(config, embed_dim, gaussians, modules), coarse)


def build_calibration(
    config: Config, embed_dim: int, gaussians: Gaussians | None, modules: Sequence[TaskModule]
) -> Calibration:
    """Returns the calibration that the configuration names. Raises ConfigError where a module has no validation
    features."""
    c = config.calibration
    if c.form == "published" or gaussians is None or METHODS[config.method.name].answering != "routed":
        return Published(scale=c.scale or float(embed_dim), bias=-1.0 if c.bias is None else c.bias)
    features = [torch.from_numpy(m.validation_features.astype("float32")) for m in modules]
    try:
        return Validated.from_validation(gaussians, features, slope=c.slope, bias=4.0 if c.bias is None else c.bias)
    except ValueError as error:
        raise ConfigError(f"calibration.form=validated: {error}") from error
