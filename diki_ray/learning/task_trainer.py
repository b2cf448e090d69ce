"""Training one task's parameters, data-parallel and resumable; plain torch, tested without Ray.

Only the prompted pass is computed (no frozen pass), and a step in a fixed number of parts (learning/parts.py), so that
the result does not depend on the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diki_ray.clip.residual import Parameters
from diki_ray.errors import UserError
from diki_ray.learning.checkpoint_schema import check_checkpoint, not_written_here
from diki_ray.learning.collective import gather_rows, own_parts, world_size
from diki_ray.learning.methods.base import Method, Step
from diki_ray.learning.optimizer import Kind, Optimizer
from diki_ray.learning.parts import StepInParts, class_features


class NonFiniteError(UserError):
    """Loss or gradient was not finite in too many batches in a row."""


def cosine_lr(step: int, num_steps: int, lr: float, final_fraction: float = 1e-3) -> float:
    """lr_s = lr_T + ½ (lr − lr_T)(1 + cos(π s / S)), lr_T = lr · final_fraction, s = 0 … S−1 (method.md)."""
    final = lr * final_fraction
    return final + 0.5 * (lr - final) * (1 + math.cos(math.pi * step / num_steps))


@dataclass(frozen=True)
class Recipe:
    """How a task is optimised; published: SGD without momentum or weight decay, lr 5.0, cosine to lr / 1000."""

    optimizer: Kind = "sgd"
    lr: float = 5.0
    final_lr_fraction: float = 1e-3
    weight_decay: float = 0.0
    max_nonfinite_steps: int = 3


@dataclass(frozen=True)
class StepResult:
    """What a global batch gave: mean loss, share of right answers, number of samples; not `applied`: no step made."""

    loss: float
    accuracy: float
    num_samples: int
    applied: bool


@dataclass
class Progress:
    """Where training stands and the best epoch so far; ties keep the earliest epoch."""

    step: int = 0
    """Global batches consumed over all epochs, whether or not they were applied."""
    best_epoch: int = -1
    best_accuracy: float = -1.0
    history: list[dict[str, float]] = field(default_factory=list)
    """One entry an epoch: loss, accuracy on train and validation."""
    loss_sum: float = 0.0
    num_correct: float = 0.0
    num_samples: int = 0
    """The steps made in the epoch under way had so many. They are part of the state, so that a resumed epoch's history
    is the undisturbed one's."""
    world_sizes: list[list[int]] = field(default_factory=list)
    """[step, number of workers from that step on], an entry whenever it changed."""

    @property
    def loss(self) -> float:
        """Mean over the epoch so far."""
        return self.loss_sum / max(self.num_samples, 1)

    @property
    def accuracy(self) -> float:
        return self.num_correct / max(self.num_samples, 1)

    def count_workers(self, number: int) -> None:
        """Notes how many make the step that is under way."""
        if not self.world_sizes or self.world_sizes[-1][1] != number:
            self.world_sizes.append([self.step, number])


class TaskTrainer:
    """One task's parameters under training.

    class_tokens: [C, L], the task's own class names in its one template; num_steps: S, over all epochs; parameters:
    all tensors of the task, those that the method does not train included; seed: the task's own; num_parts: of a step,
    at least the number of workers; None: one for each worker, so that rounding depends on how many there are.
    """

    def __init__(
        self,
        method: Method,
        class_tokens: Tensor,
        recipe: Recipe,
        num_steps: int,
        parameters: Parameters,
        seed: int = 0,
        num_parts: int | None = None,
    ) -> None:
        self.method, self.recipe, self.num_steps, self.seed = method, recipe, num_steps, seed
        self._num_parts = num_parts
        self.device = device = method.backbone.device
        self.class_tokens = class_tokens.cpu()  # they are laid out in rows before they go to the device
        own = {name: p.detach().clone().to(device) for name, p in parameters.items()}
        self.parameters = {name: p.requires_grad_() for name, p in own.items() if method.is_trained(name)}
        self.kept = {name: p for name, p in own.items() if not method.is_trained(name)}
        self.optimizer = Optimizer(list(self.parameters.values()), recipe.optimizer, recipe.weight_decay)
        self.best = self._copy()
        self.progress = Progress()
        self.nonfinite_in_a_row = 0
        self.num_nonfinite = 0

    @property
    def num_parts(self) -> int:
        """A step has so many; with weights shared out, where all workers make the same passes, one for each worker."""
        in_lockstep = self.method.backbone.in_lockstep
        return world_size() if in_lockstep or self._num_parts is None else self._num_parts

    def begin(self, sums: Parameters) -> None:
        """Starts from what the method makes of its first sums over the training images."""
        with torch.no_grad():
            for name, p in self.method.begin(self.all_parameters, sums, self.class_tokens).items():
                self.all_parameters[name].copy_(p)
        self.best = self._copy()

    def step(self, images: Tensor, labels: Tensor, keys: tuple[str, ...] = ()) -> StepResult:
        """One global batch, of which this worker has one part: images [b, 3, H, W] and labels [b], b may be 0."""
        return self.step_in_parts([(images, labels)], keys)

    def step_in_parts(self, batch: Sequence[tuple[Tensor, Tensor]], keys: tuple[str, ...] = ()) -> StepResult:
        """One global batch: images [b, 3, H, W] and labels [b] of each of this worker's parts, b may be 0.

        A loss or gradient that is not finite in any part means no step on any worker; after
        `max_nonfinite_steps` in a row NonFiniteError names the batch's keys.
        """
        step = self._step()
        sums = StepInParts(self.method, self.class_tokens, self.parameters, self.kept, step).sums(batch)
        loss_sum, num_correct, num_samples = sums[-3:].tolist()
        self.progress.count_workers(world_size())
        self.progress.step += 1
        finite = bool(torch.isfinite(sums).all())
        count = int(num_samples)
        if finite and count:
            self._apply(sums[:-3] / count, replace(step, num_samples=count))
            self.nonfinite_in_a_row = 0
            self.progress.loss_sum += loss_sum
            self.progress.num_correct += num_correct
            self.progress.num_samples += count
        elif not finite:
            self._strike(keys)
        mean = (loss_sum / count, num_correct / count) if count else (math.nan, math.nan)
        return StepResult(mean[0], mean[1], count, finite and count > 0)

    def _step(self) -> Step:
        number, recipe = self.progress.step, self.recipe
        lr = cosine_lr(number, self.num_steps, recipe.lr, recipe.final_lr_fraction)
        return Step(number, self.num_steps, lr, self.seed, num_parts=self.num_parts)

    @property
    def all_parameters(self) -> Parameters:
        """Trained and kept tensors."""
        return self.parameters | self.kept

    def _class_features(self) -> Tensor:
        """[C, E] as they are outside of a step, each part's classes by the worker that has the part."""
        parameters, step = self.method.effective(self.all_parameters), self._step()
        own = [replace(step, part=part) for part in own_parts(step.num_parts)]
        features = [class_features(self.method, self.class_tokens, parameters, s) for s in own]
        return gather_rows(features, len(self.class_tokens), step.num_parts)

    def _apply(self, flat: Tensor, step: Step) -> None:
        parts = flat.split([p.numel() for p in self.parameters.values()])
        gradients = {n: g.view_as(p) for (n, p), g in zip(self.parameters.items(), parts, strict=True)}
        self.optimizer.step(list(gradients.values()), step.lr)
        with torch.no_grad():
            self.method.after_step(self.all_parameters, gradients, step)

    def _strike(self, keys: tuple[str, ...]) -> None:
        self.nonfinite_in_a_row += 1
        self.num_nonfinite += 1
        if self.nonfinite_in_a_row >= self.recipe.max_nonfinite_steps:
            shown = ", ".join(keys[:8]) + (" …" if len(keys) > 8 else "")
            raise NonFiniteError(
                f"loss or gradient was not finite in {self.nonfinite_in_a_row} batches in a row, at step "
                f"{self.progress.step}; no step was made on any worker. This worker's last batch: {shown or 'empty'}. "
                "Lower train.lr, or look at these samples."
            )

    @torch.no_grad()
    def num_correct(self, images: Tensor, labels: Tensor, class_features: Tensor) -> int:
        """Right answers on this rank's images with the task's own module at w = 1, without routing."""
        if not len(images) and not self.method.backbone.in_lockstep:
            return 0
        parameters = self.method.effective(self.all_parameters)
        logits = self.method.logits(self.method.image_features(images, parameters), class_features, parameters)
        return int((logits.argmax(1).cpu() == labels.cpu()).sum())

    @torch.no_grad()
    def class_features(self) -> Tensor:
        """[C, E] under the current parameters; every rank must call it."""
        return self._class_features()

    def end_epoch(self, epoch: int, validation_accuracy: float | None) -> bool:
        """Records the epoch; True when it is the best so far (the last one always, where there is no validation)."""
        p = self.progress
        summary = {"loss": p.loss, "accuracy": p.accuracy}
        p.history.append(
            summary if validation_accuracy is None else summary | {"validation_accuracy": validation_accuracy}
        )
        p.loss_sum, p.num_correct, p.num_samples = 0.0, 0.0, 0
        better = validation_accuracy is None or validation_accuracy > self.progress.best_accuracy
        if better:
            self.best = self._copy()
            self.progress.best_epoch = epoch
            self.progress.best_accuracy = -1.0 if validation_accuracy is None else validation_accuracy
        return better

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.all_parameters.items()}

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(header, arrays): all that resuming needs, to continue bit for bit."""
        arrays = {f"parameters/{n}": p.detach().cpu().numpy() for n, p in self.all_parameters.items()}
        arrays |= {f"best/{n}": p.cpu().numpy() for n, p in self.best.items()}
        for index, moments in self.optimizer.state.items():
            arrays |= {f"optimizer/{index}/{n}": v.cpu().numpy() for n, v in moments.items()}
        header = {
            "progress": vars(self.progress),
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "num_nonfinite": self.num_nonfinite,
            "world_size": world_size(),
        }
        return header, arrays

    def load_state(self, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Continues from `state()` of the same task.

        Raises:
            CorruptError: it is none.
        """
        check_checkpoint(header, arrays, {name: tuple(p.shape) for name, p in self.all_parameters.items()})
        with torch.no_grad():
            for name, p in self.all_parameters.items():
                p.copy_(torch.from_numpy(arrays[f"parameters/{name}"].copy()))
                self.best[name].copy_(torch.from_numpy(arrays[f"best/{name}"].copy()))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in arrays.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                moments.setdefault(int(index), {})[name] = torch.from_numpy(value.copy())
        try:
            self.optimizer.load(moments)
        except ValueError as error:
            raise not_written_here(str(error)) from None
        self.progress = Progress(**header["progress"])
        self.nonfinite_in_a_row = header["nonfinite_in_a_row"]
        self.num_nonfinite = header["num_nonfinite"]
