"""What keeps a task's training from undoing the earlier ones, beside low-rank factors: the interface of EWC,
BAdam and BLIP.

The base class is no regularisation: plain fine-tuning from task to task.
"""

from __future__ import annotations

from torch import Tensor

from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods.base import Method, Step, TrainingBatch


class Regulariser:
    def begun(self, start: Parameters, predecessor: Parameters | None) -> Parameters:
        """All tensors of a task before training, from the factors at its start and all tensors of the module before."""
        return start | self.kept(start, predecessor)

    def kept(self, start: Parameters, predecessor: Parameters | None) -> Parameters:
        """What is kept beside a task's factors while it is trained; from the same."""
        return {}

    def drawn(self, factors: Parameters, parameters: Parameters, step: Step) -> Parameters:
        """The factors under which a training step's features are computed."""
        return factors

    def penalty(self, parameters: Parameters) -> Tensor | None:
        """Returns what is added to the loss."""
        return None

    def after_step(self, parameters: Parameters, gradients: Parameters, step: Step) -> None:
        """Changes tensors in place after an optimiser step."""

    def sums(self, method: Method, parameters: Parameters, batch: TrainingBatch) -> Parameters:
        """Returns what is summed over the training images of a task that is trained."""
        return {}

    def finish(self, parameters: Parameters, sums: Parameters) -> Parameters:
        """What the module holds beside the factors, and in their place where it is of their names."""
        return {}
