"""The predictor that a configuration asks for, over modules that are at hand: the one place where the two meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diki_ray.answering.coarse import CoarseGaussians
from diki_ray.answering.gaussians import Gaussians
from diki_ray.answering.predictor import Predictor
from diki_ray.answering.routing import Calibration, Published, Validated
from diki_ray.config import Config
from diki_ray.errors import ConfigError
from diki_ray.learning.methods import METHODS, Method
from diki_ray.learning.module import TaskModule

COARSE_FROM_TASKS = 64
"""From this many on, a run's predictor rules tasks out by a bound before it computes densities (coarse.py)."""


def build_predictor(
    config: Config,
    method: Method,
    modules: Sequence[TaskModule],
    coarse_from: int | None = None,
    **tables: Any,
) -> Predictor:
    """The predictor over these modules, in their order.

    coarse_from: with so many modules or more, only the densities that decide an image's route are computed, and the
        others are minus infinity; every density by default, as tables of answers need them.
    tables: the predictor's `always_tabulated` and `table_bytes`.

    Raises:
        ConfigError: the calibration needs what a module does not have.
    """
    gaussians = (
        Gaussians([m.moments for m in modules], config.statistics.covariance_eps, config.statistics.shrinkage)
        if modules
        else None
    )
    if gaussians is not None:
        gaussians.to(method.backbone.device)
    coarse = gaussians is not None and coarse_from is not None and len(gaussians) >= coarse_from
    return Predictor(
        method,
        modules,
        CoarseGaussians(gaussians) if coarse and gaussians else gaussians,
        build_calibration(config, method.backbone.embed_dim, gaussians, modules),
        text_grid=config.evaluate.text_grid,
        skip_weight=config.evaluate.skip_weight,
        **tables,
    )


def build_calibration(
    config: Config, embed_dim: int, gaussians: Gaussians | None, modules: Sequence[TaskModule]
) -> Calibration:
    c = config.calibration
    if c.form == "published" or gaussians is None or METHODS[config.method.name].answering != "routed":
        return Published(scale=c.scale or float(embed_dim), bias=-1.0 if c.bias is None else c.bias)
    features = [torch.from_numpy(m.validation_features.astype("float32")) for m in modules]
    try:
        return Validated.from_validation(gaussians, features, slope=c.slope, bias=4.0 if c.bias is None else c.bias)
    except ValueError as error:
        raise ConfigError(f"calibration.form=validated: {error}") from error
