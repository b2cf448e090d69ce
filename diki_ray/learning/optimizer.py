"""SGD and AdamW of torch, by their functional forms.

The bits are those of `torch.optim.SGD` and `torch.optim.AdamW`, whose objects import torch's compiler at their first
step: 2 s of a core in every worker that trains, for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

Kind = Literal["sgd", "adamw"]
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""AdamW keeps for each tensor the number of its steps, a scalar on the CPU, and two means of the tensor's own shape."""


class Optimizer:
    """Steps for some float tensors of any shape, which it changes in place."""

    def __init__(self, tensors: Sequence[Tensor], kind: Kind = "sgd", weight_decay: float = 0.0) -> None:
        self._tensors, self.kind, self._weight_decay = list(tensors), kind, weight_decay
        self.state: dict[int, dict[str, Tensor]] = {}
        """MOMENTS by the number of their tensor; empty for SGD and before the first step."""

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """One step along gradients, one of each tensor and its shape."""
        if self.kind == "sgd":
            no_momentum: list[Tensor | None] = [None] * len(self._tensors)
            sgd(
                self._tensors,
                list(gradients),
                no_momentum,
                weight_decay=self._weight_decay,
                momentum=0.0,
                lr=lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
            return
        if not self.state:
            self.state = {n: _zero_moments(tensor) for n, tensor in enumerate(self._tensors)}
        steps, means, squares = ([moments[name] for moments in self.state.values()] for name in MOMENTS)
        adamw(
            self._tensors,
            list(gradients),
            means,
            squares,
            [],
            steps,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr,
            weight_decay=self._weight_decay,
            eps=1e-8,
            maximize=False,
        )

    def load(self, state: dict[int, dict[str, Tensor]]) -> None:
        """Goes on from the state of another one for the same tensors.

        Raises:
            ValueError: the state is not that of an optimiser of this kind for these tensors.
        """
        zeros = {n: _zero_moments(tensor) for n, tensor in enumerate(self._tensors)} if self.kind == "adamw" else {}
        if state and _shapes(state) != _shapes(zeros):
            raise ValueError(f"this is no state of {self.kind} for {len(self._tensors)} tensors of these shapes")
        self.state = {n: {m: zeros[n][m].copy_(state[n][m]) for m in MOMENTS} for n in zeros} if state else {}


def _zero_moments(tensor: Tensor) -> dict[str, Tensor]:
    zeros = (torch.tensor(0.0), torch.zeros_like(tensor), torch.zeros_like(tensor))
    return {name: value.detach() for name, value in zip(MOMENTS, zeros, strict=True)}


def _shapes(state: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, tuple[int, ...]]]:
    return {n: {name: tuple(value.shape) for name, value in moments.items()} for n, moments in state.items()}
