"""Among many tasks an upper bound of every log density rules most out, and exact densities decide between the rest.

With Σ = L Lᵀ and z = L⁻¹(f − μ), ‖z‖² ≥ ‖Qᵀz‖² for any Q with orthonormal columns, so

    log N(f; μ, Σ) ≤ −½ ‖Qᵀ L⁻¹ (f − μ)‖² − ½ log|Σ| − ½ E log 2π.

A task whose bound is below another task's exact density is ruled out: the best task and its density are those of
computing all, whatever Q is. Q decides only how many are left; it spans the directions in which the images of all
tasks together lie farthest from this one's mean in its own metric, found by subspace iteration.

Shapes: N features, E embedding dimensions, T tasks, R directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diki_ray.answering.gaussians import Gaussians

ROUNDING = 1e-6
"""It is relative to a bound; in float64 the two sides of the inequality are rounded apart by far less."""


class CoarseGaussians:
    """Stands for `Gaussians` in routing alone: exact for each feature's best task, minus infinity for tasks ruled out.

    rank: R, directions a task; by default E/8, at least 16. Costs R/E of the exact densities in time and 2R/E of their
        memory, and an iteration over every task's factor when it is made.
    """

    def __init__(self, gaussians: Gaussians, rank: int | None = None, num_iterations: int = 2):
        self.gaussians = gaussians
        e = gaussians.mean.shape[1]
        rank = min(e, rank or max(16, e // 8))
        centre = gaussians.mean.mean(0)
        off_centre = gaussians.mean - centre
        pooled = gaussians.mean_covariance + off_centre.T @ off_centre / len(gaussians)  # of all tasks' images
        start = torch.randn(e, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(centre.device)
        projections = []
        for task in range(len(gaussians)):
            factor, q = gaussians.factor(task), start
            delta = centre - gaussians.mean[task]
            for _ in range(num_iterations):
                x = torch.linalg.solve_triangular(factor.T, q, upper=True)
                x = pooled @ x + delta[:, None] * (delta @ x)  # second moment about this task's mean
                q = torch.linalg.qr(torch.linalg.solve_triangular(factor, x, upper=False)).Q
            projections.append(torch.linalg.solve_triangular(factor.T, q, upper=True).T)
        self.projection = torch.stack(projections)  # [T, R, E], Qᵀ L⁻¹
        self.offset = (self.projection @ gaussians.mean[:, :, None])[..., 0]  # [T, R]

    def __len__(self) -> int:
        return len(self.gaussians)

    def upper_bound(self, features: Tensor) -> Tensor:
        """Returns [N, T] float64, nowhere below the log density but for rounding."""
        f = features.to(self.projection.device, torch.float64)
        projected = f @ self.projection.flatten(0, 1).T - self.offset.flatten()
        squared = projected.unflatten(1, self.offset.shape).square().sum(2)
        return -0.5 * squared - self.gaussians.half_log_det - self.gaussians.constant

    def log_density(self, features: Tensor) -> Tensor:
        """Returns [N, T] float64: exact where computed, each feature's best task among them; minus infinity
        elsewhere."""
        f = features.to(self.projection.device, torch.float64)
        bound = self.upper_bound(f)
        bound += ROUNDING * bound.abs()
        exact = torch.full_like(bound, -torch.inf)
        # The most promising first: what these reach rules out most others. Then all that is left at once, for a task's
        # factor is read whole, however few features want it.
        for at_once in (1, 4, len(self)):
            bound[bound < exact.max(1, keepdim=True).values] = -torch.inf
            left, tasks = bound.topk(min(at_once, len(self)))
            rows, places = (left > -torch.inf).nonzero(as_tuple=True)
            if not len(rows):
                break
            pairs = rows, tasks[rows, places]
            exact[pairs] = self.gaussians.log_density_of(pairs[1], f[rows])
            bound.scatter_(1, tasks, -torch.inf)
        return exact.to(features.device)
