"""The class model of the tasks learnt, in the two places where a predictor asks it: as router, and as head.

Which tasks are learnt changes the model, so there is one for each set of them; those asked last are kept.

Shapes: N images, E embedding dimensions, T tasks learnt, C candidates.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from diki_ray.answering.class_answers import ClassDensities
from diki_ray.answering.class_model import ClassModel, LearntClasses
from diki_ray.answering.routing import Scores
from diki_ray.config.class_model import ClassModelSection
from diki_ray.learning.module import TaskModule

WEIGHT_STEPS = 32
"""Integration weights are rounded to multiples of 1/32. Learning another task moves a likelihood ratio a little; the
rounded weight seldom, and then the image's residual pass is the one that is known. Tables of class features have the
same points (`evaluate.text_grid: 33`), so they are exact there."""
KEPT_MODELS = 16
"""Models of sets of tasks that are kept: an order sweep asks set after set, a stream its prefixes."""
FACTOR_BYTES = 2**27
"""Factors of the tasks' own covariances that each of them keeps: 64 tasks of 512 dimensions."""


class ClassModels:
    """The class models of any of the modules' tasks.

    former: those of other modules with the same constants. What they keep of these tasks is taken over, so that a task
        more is added to their model.
    device: where densities are computed, if it is a CUDA card. Models are fitted on the CPU, so they are the same
        everywhere.

    Raises:
        ConfigError: a module has no class means.
    """

    def __init__(
        self,
        modules: Sequence[TaskModule],
        constants: ClassModelSection,
        former: ClassModels | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self._device = torch.device(device)
        self._tasks = [LearntClasses(m.key, m.class_names, m.class_statistics) for m in modules]
        self._constants = constants
        self._kept: OrderedDict[tuple[int, ...], ClassModel] = OrderedDict()
        # By their sums themselves: a task that was taken out and learnt anew may have the same key and other sums.
        numbers = {id(task.statistics): number for number, task in enumerate(self._tasks)}
        for model in () if former is None else former._kept.values():
            known = [numbers.get(id(task.statistics)) for task in model.tasks]
            if None not in known:
                self._kept[tuple(number for number in known if number is not None)] = model

    def of(self, learnt: Sequence[int]) -> ClassModel:
        """The model of the tasks `learnt` (numbers of modules), its columns in that order."""
        key = tuple(learnt)
        found = self._kept.get(key)
        if found is None:
            grown = self._kept.get(key[:-1])  # a stream learns one task after another
            if grown is not None and key[:-1]:
                found = grown.with_task(self._tasks[key[-1]])
            else:
                found = ClassModel([self._tasks[t] for t in key], self._constants, FACTOR_BYTES)
            self._kept[key] = found
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT_MODELS:
            self._kept.popitem(last=False)
        return found.on(self._device)


class ClassRouter:
    """Routes by the posterior over the tasks learnt, and weighs by the likelihood ratio against a class never seen."""

    by_task: ClassVar[bool] = False  # the covariance within classes is pooled over the tasks learnt

    def __init__(self, models: ClassModels) -> None:
        self.models = models

    def scores(self, features: Tensor, learnt: Sequence[int]) -> Scores:
        densities = ClassDensities(self.models.of(learnt), features)
        weight = (densities.weight() * WEIGHT_STEPS).round() / WEIGHT_STEPS
        return Scores(learnt, densities.log_density(), weight)

    def about(self, features: Tensor) -> Callable[[Sequence[int]], Scores]:
        return partial(self.scores, features)


class ClassHead:
    """Answers by the class model, alone or beside what a trained module says.

    beside: the weight of the class model's logits in the mean with a module's, whose weight is 1; None: they are the
        answer. A mean, for the sum of two logits that are each calibrated would be sure of itself too often.
    """

    def __init__(self, models: ClassModels, beside: float | None) -> None:
        self.models, self._beside = models, beside

    @torch.no_grad()
    def logits(
        self, frozen: Tensor, own: Tensor, zero_shot: Tensor, names: Sequence[str], learnt: Sequence[int]
    ) -> Tensor:
        """[N, C] among candidates of these names, of images with these frozen features [N, E].

        own: the logits of the module that each image is routed to [N, C]; zero_shot: the frozen model's. Where nothing
        is learnt, and by the model alone also where no candidate is, the zero-shot logits come back bit for bit.
        """
        if not learnt:
            return zero_shot
        scores = ClassDensities(self.models.of(learnt), frozen).logits(zero_shot, names)
        return scores if self._beside is None else (own + self._beside * scores) / (1 + self._beside)
