"""The covariances Q_t of the tasks themselves, with which the class model compares classes (class_model.py): each for
itself, as an image first needs it, or all of them at once.

Shapes: N images, E embedding dimensions, T tasks, R classes with images over all tasks, C of one task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 2**28
"""Whitened images of all tasks that there are at once."""


@dataclass(frozen=True, eq=False)
class OwnCovariance:
    """One task's Q_t, factored: log densities q_c of its classes."""

    factor: Tensor  # lower triangular [E, E]
    centre: Tensor  # [E]
    whitened: Tensor  # [E, C], L⁻¹ (a_c − centre)
    log_norm: float

    def log_density(self, features: Tensor) -> Tensor:
        """[C, N] of features [N, E] float64."""
        z = torch.linalg.solve_triangular(self.factor, (features - self.centre).T, upper=False)
        squared = (self.whitened**2).sum(0)[:, None] + (z**2).sum(0) - 2 * self.whitened.T @ z
        return self.log_norm - 0.5 * squared.clamp(min=0)

    @property
    def num_bytes(self) -> int:
        return 8 * (self.factor.numel() + self.whitened.numel())


@dataclass(frozen=True, eq=False)
class OwnCovariances:
    """The covariances of all tasks as one: ‖L⁻¹ (v − a_c)‖² = ‖L⁻¹ (v − m)‖² − 2 d_c·(v − m) + ‖L⁻¹ (a_c − m)‖² with m
    the task's centre and d_c = Q_t⁻¹ (a_c − m)."""

    inverse: Tensor  # [T, E, E], L⁻¹
    centre: Tensor  # [T, E, 1], L⁻¹ m
    direction: Tensor  # [R, E], d_c
    offset: Tensor  # [R, 1], 2 d_c·m + ‖L⁻¹ (a_c − m)‖²
    log_norm: Tensor  # [R, 1]

    @staticmethod
    def of(tasks: Sequence[OwnCovariance]) -> OwnCovariances:
        eye = torch.eye(len(tasks[0].centre), dtype=torch.float64, device=tasks[0].centre.device)
        inverse = torch.stack([torch.linalg.solve_triangular(t.factor, eye, upper=False) for t in tasks])
        directions = [t.whitened.T @ i for t, i in zip(tasks, inverse, strict=True)]
        offsets = [2 * d @ t.centre + (t.whitened**2).sum(0) for d, t in zip(directions, tasks, strict=True)]
        return OwnCovariances(
            inverse,
            torch.stack([i @ t.centre for t, i in zip(tasks, inverse, strict=True)])[:, :, None],
            torch.cat(directions),
            torch.cat(offsets)[:, None],
            torch.cat([torch.full_like(o, t.log_norm) for t, o in zip(tasks, offsets, strict=True)])[:, None],
        )

    def log_density(self, features: Tensor, task_of_row: Tensor) -> Tensor:
        """[R, N] of features [N, E] float64, with the task of each class [R]."""
        chunks = features.split(max(1, CHUNK_BYTES // (8 * self.centre.numel())))
        squared = torch.cat([((self.inverse @ f.T - self.centre) ** 2).sum(1) for f in chunks], dim=1)[task_of_row]
        squared += self.offset - 2 * self.direction @ features.T
        return self.log_norm - 0.5 * squared.clamp(min=0)
