"""From a configuration and stored modules to a predictor: the one place where the two meet, for the evaluator,
`jobs/predict.py` and serving."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diki_ray.config import Config
from diki_ray.errors import ConfigError
from diki_ray.model.gaussian import Gaussians
from diki_ray.model.methods import Method
from diki_ray.model.module import TaskModule
from diki_ray.model.predictor import Predictor
from diki_ray.model.routing import Calibration, Published, Validated


def build_predictor(config: Config, method: Method, modules: Sequence[TaskModule]) -> Predictor:
    """The predictor over these modules, in their order.

    Raises:
        ConfigError: the calibration needs what a module does not have.
    """
    gaussians = (
        Gaussians([m.moments for m in modules], config.statistics.covariance_eps, config.statistics.shrinkage)
        if modules
        else None
    )
    return Predictor(
        method,
        modules,
        gaussians,
        build_calibration(config, method.backbone.embed_dim, gaussians, modules),
        text_grid=config.evaluate.text_grid,
        skip_weight=config.evaluate.skip_weight,
    )


def build_calibration(
    config: Config, embed_dim: int, gaussians: Gaussians | None, modules: Sequence[TaskModule]
) -> Calibration:
    c = config.calibration
    if c.form == "published" or gaussians is None:
        return Published(scale=c.scale or float(embed_dim), bias=-1.0 if c.bias is None else c.bias)
    features = [torch.from_numpy(m.validation_features.astype("float32")) for m in modules]
    try:
        return Validated.from_validation(gaussians, features, slope=c.slope, bias=4.0 if c.bias is None else c.bias)
    except ValueError as error:
        raise ConfigError(f"calibration.form=validated: {error}") from error
