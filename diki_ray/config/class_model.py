"""The settings of the class model (answering/class_model.py) and of what routes by it. None enters a module's key."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diki_ray.config.affects import ChangesAnswers
from diki_ray.config.section import Section


class RoutingSection(Section):
    """What tells the task of an image, and how much of that task's module to let in."""

    density: ChangesAnswers[Literal["classes", "task"]] = "classes"
    """classes: the class model, a Gaussian for each class with a covariance that all tasks share; the weight is a
    likelihood ratio against a class never seen and needs no `calibration`. task: one Gaussian a task, as published,
    with `statistics` and `calibration`."""


class ClassModelSection(Section):
    """The closed-form model of all classes learnt: it routes (`routing.density: classes`), answers by itself
    (`method.name: classes`), or beside trained modules. Its values were chosen on validation images of seven sets."""

    beside_modules: ChangesAnswers[float] = Field(default=2.5, ge=0)
    """The weight of its logits in the mean with those of a trained, routed module, which have 1; 0: the module alone.
    Only with `routing.density: classes`."""
    likelihood_ratio: ChangesAnswers[float] = Field(default=0.5, ge=0)
    """The factor of the log likelihood ratio between classes learnt and one never seen, where these are compared. It is
    below 1, because images that no Gaussian fits are unlikely under all of them."""
    own_covariance: ChangesAnswers[float] = Field(default=0.2, ge=0, le=1)
    """The share of a task's own covariance, beside the pooled one, where tasks are compared."""
    zero_shot_between: ChangesAnswers[float] = Field(default=1.0, ge=0)
    """The factor of the zero-shot logits where tasks and classes not learnt are compared."""
    zero_shot_within: ChangesAnswers[float] = Field(default=0.3, ge=0)
    """The factor of the zero-shot logits among the classes of one task."""
    most_pooled: ChangesAnswers[float] = Field(default=4.0, gt=0)
    """A task's part in the pooled covariance grows with its images up to this many images per dimension, so that one
    large task does not decide what is likely for all others."""
    pooling: ChangesAnswers[float] = Field(default=1.0, gt=0)
    """At this many images per dimension a task's own covariance counts as much as the pooled one."""
    sharpness: ChangesAnswers[float | None] = Field(default=None, gt=0)
    """The factor of its logits: below 1 confidences are milder. It changes no answer of the model alone. By default
    3 / √E in E dimensions: validation and leave-one-out likelihood chose 0.43 for E = 64, and 0.17 to 0.20 for 256."""
