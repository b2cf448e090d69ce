"""The tasks have Gaussians over the frozen model's image features, whose log densities choose an image's task.

Shapes: N features, E embedding dimensions, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diki_ray.errors import ConfigError
from diki_ray.learning.moments import Moments, Shrinkage

CHUNK_BYTES = 32 * 2**20
"""The largest intermediate of `log_density` has so many, so that its memory does not grow with the number of tasks."""
COPIED_BYTES = 128 * 2**10
"""A factor of so many is cheaper to copy than a call is to make."""


class Gaussians:
    """Factors the Gaussians of T tasks once, and gives log densities of features under all of them.

    The Cholesky factors are kept packed, E(E+1)/2 numbers each, in a form that is solved without unpacking (LAPACK's
    rectangular full packed format): with h = ⌈E/2⌉ a lower triangular L = [[A, 0], [B, C]] has A [h, h] in the lower
    triangle of `corners` [h, h + 1], Cᵀ to the right above it, and B in `below` [E − h, h].
    """

    def __init__(self, moments: Sequence[Moments], eps: float = 1e-7, shrinkage: Shrinkage = "none"):
        t, e = len(moments), len(moments[0].mean)
        h = (e + 1) // 2
        self.mean = torch.empty(t, e, dtype=torch.float64)
        self.corners = torch.empty(t, h, h + 1, dtype=torch.float64)
        self.below = torch.empty(t, e - h, h, dtype=torch.float64)
        self.half_log_det = torch.empty(t, dtype=torch.float64)
        self.mean_covariance = torch.zeros(e, e, dtype=torch.float64)
        for n, m in enumerate(moments):
            covariance = torch.from_numpy(m.covariance(eps, shrinkage))
            factor, failed = torch.linalg.cholesky_ex(covariance)
            if int(failed) or not factor.isfinite().all():
                raise ConfigError(
                    f"the covariance of task number {n} is not positive definite: its statistics are damaged, or have "
                    "fewer images than dimensions; train the task again, or set statistics.shrinkage=oas."
                )
            self.mean[n] = torch.from_numpy(m.mean)
            self.corners[n, :, :h] = factor[:h, :h]
            self.corners[n, :, h] = 0
            self.corners[n, : e - h, 1 : e - h + 1] += factor[h:, h:].T
            self.below[n] = factor[h:, :h]
            self.half_log_det[n] = factor.diagonal().log().sum()
            self.mean_covariance += covariance / t

    def __len__(self) -> int:
        return len(self.mean)

    def to(self, device: str | torch.device) -> Gaussians:
        """Moves the factors to a device, where densities are computed from then on."""
        for name, value in vars(self).items():
            setattr(self, name, value.to(device))
        return self

    @property
    def num_bytes(self) -> int:
        """The packed factors take so many bytes."""
        return 8 * (self.corners.numel() + self.below.numel())

    @property
    def constant(self) -> float:
        """It is ½ E log 2π."""
        return 0.5 * self.mean.shape[1] * math.log(2 * math.pi)

    def factor(self, task: int) -> Tensor:
        """Returns the lower triangular L [E, E] of Σ = L Lᵀ."""
        e, h = self.mean.shape[1], self.corners.shape[1]
        factor = self.mean.new_zeros(e, e)
        factor[:h, :h] = self.corners[task, :, :h].tril()
        factor[h:, :h] = self.below[task]
        factor[h:, h:] = self.corners[task, : e - h, 1 : e - h + 1].triu().T
        return factor

    def log_density(self, features: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Returns log N(f; μ_t, Σ_t) [N, T] float64 of features [N, E] under these tasks (by default all), by
        triangular solves with the Cholesky factors."""
        chosen: Sequence[int] = range(len(self)) if tasks is None else tasks
        f = features.to(self.mean.device, torch.float64)
        out = f.new_empty(len(chosen), len(f))
        step = max(1, CHUNK_BYTES // max(1, 8 * f.numel()))
        for first in range(0, len(chosen), step):
            out[first : first + step] = self._log_density(_rows(chosen[first : first + step], f.device), f[None])
        return out.T.to(features.device)

    def log_density_of(self, tasks: Tensor, features: Tensor) -> Tensor:
        """Returns log N(f; μ_t, Σ_t) [N]: each feature [N, E] under a task of its own, tasks int64 [N]."""
        f, tasks = features.to(self.mean.device, torch.float64), tasks.to(self.mean.device)
        out = f.new_empty(len(f))
        if self.num_bytes <= len(self) * COPIED_BYTES:  # a factor for each feature: one call for many small ones
            for rows in torch.arange(len(f), device=f.device).split(CHUNK_BYTES // COPIED_BYTES):
                out[rows] = self._log_density(tasks[rows], f[rows, None])[:, 0]
        else:
            order = tasks.argsort(stable=True)
            distinct, counts = tasks[order].unique_consecutive(return_counts=True)
            for task, rows in zip(distinct.tolist(), order.split(counts.tolist()), strict=True):
                out[rows] = self._log_density(slice(task, task + 1), f[None, rows])[0]
        return out.to(features.device)

    def _log_density(self, tasks: slice | Tensor, f: Tensor) -> Tensor:
        """Returns [t, N] of f [1, N, E], or of f [t, N, E]."""
        e, h = self.mean.shape[1], self.corners.shape[1]
        centred = (f - self.mean[tasks][:, None]).mT  # [t, E, N]
        corners, below = self.corners[tasks], self.below[tasks]
        first = torch.linalg.solve_triangular(corners[:, :, :h], centred[:, :h], upper=False)
        rest = centred[:, h:] - below @ first
        second = torch.linalg.solve_triangular(corners[:, : e - h, 1 : e - h + 1].mT, rest, upper=False)
        squared = (first**2).sum(1) + (second**2).sum(1)
        return -0.5 * squared - self.half_log_det[tasks][:, None] - self.constant


def _rows(tasks: Sequence[int], device: torch.device) -> slice | Tensor:
    """Returns the index of these tasks' factors: a slice, which copies none, where they follow one another."""
    if list(tasks) == list(range(tasks[0], tasks[0] + len(tasks))):
        return slice(tasks[0], tasks[0] + len(tasks))
    return torch.as_tensor(list(tasks), device=device)
