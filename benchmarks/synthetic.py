"""Gaussians of tasks that were never learnt, for measuring routing at scale.

Like those of real CLIP features: unit-norm features in a narrow cone, spectra that fall off over three decades, tasks
that share most of their principal directions. How hard they are to tell apart is that of seven real data sets on a CLIP
of 256 dimensions: a bound from 16 directions leaves 5 to 9 % of the other tasks open here, and 11 % there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diki_ray.answering.class_model import LearntClasses
from diki_ray.answering.gaussians import Gaussians
from diki_ray.learning.moments import Moments
from diki_ray.learning.statistics import Statistics

NUM_REFLECTIONS = 2


class SyntheticMoments(Sequence[Moments]):
    """Moments of that many tasks of 4·E images each; made when asked for, so that they need no memory."""

    def __init__(self, num_tasks: int, embed_dim: int, seed: int = 0):
        self.num_tasks, self.seed = num_tasks, seed
        rng = np.random.default_rng(seed)
        self.cone = _unit(rng.normal(size=embed_dim))
        self.spectrum = 0.1 * np.arange(1, embed_dim + 1) ** -1.2
        self.directions = np.linalg.qr(rng.normal(size=(embed_dim, embed_dim)))[0]

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, task: int) -> Moments:  # type: ignore[override]
        if not 0 <= task < self.num_tasks:
            raise IndexError(task)
        rng, e = np.random.default_rng((self.seed, task)), len(self.cone)
        mean = 0.8 * self.cone + self.directions @ (self.spectrum**0.5 * rng.normal(size=e))
        covariance = (self.directions * (self.spectrum * np.exp(0.5 * rng.normal(size=e)))) @ self.directions.T
        for _ in range(NUM_REFLECTIONS):  # Householder: a few principal directions of its own
            v = _unit(rng.normal(size=e))
            u = covariance @ v
            covariance -= 2 * (np.outer(v, u) + np.outer(u, v)) - 4 * (v @ u) * np.outer(v, v)
        return Moments(4 * e, mean, (4 * e - 1) * covariance)


def synthetic_features(gaussians: Gaussians, num_images: int, seed: int = 1) -> Tensor:
    """float32 [N, E]: each drawn from a task chosen at random, then made a unit vector."""
    rng = np.random.default_rng(seed)
    rows = []
    for task in rng.integers(len(gaussians), size=num_images).tolist():
        noise = torch.from_numpy(rng.normal(size=gaussians.mean.shape[1])).to(gaussians.mean.device)
        rows.append(gaussians.mean[task] + gaussians.factor(task) @ noise)
    return torch.nn.functional.normalize(torch.stack(rows), dim=1).float()


def synthetic_classes(source: SyntheticMoments, task: int, num_classes: int, shots: int) -> LearntClasses:
    """The sums of a task of the source: its classes' means are drawn with half of its covariance, its images about
    them with the other half."""
    images, labels = _images(source, task, np.random.default_rng((source.seed, task, 1)), num_classes, shots)
    names = tuple(f"class {c} of task {task}" for c in range(num_classes))
    return LearntClasses(f"{task:06d}", names, Statistics.of(images, labels, num_classes))


def synthetic_images(source: SyntheticMoments, num_images: int, num_classes: int, seed: int = 1) -> Tensor:
    """float32 [N, E]: further images of tasks and classes chosen at random."""
    tasks = np.random.default_rng(seed).integers(len(source), size=num_images).tolist()
    rng = [np.random.default_rng((source.seed, task, 1)) for task in tasks]
    rows = [_images(source, t, r, num_classes, 2)[0][-1] for t, r in zip(tasks, rng, strict=True)]
    return torch.from_numpy(np.stack(rows)).float()


def _images(
    source: SyntheticMoments, task: int, rng: np.random.Generator, num_classes: int, shots: int
) -> tuple[np.ndarray, np.ndarray]:
    moments = source[task]
    factor = np.linalg.cholesky(moments.scatter / (2 * moments.count) + 1e-9 * np.eye(len(moments.mean)))
    means = moments.mean + rng.normal(size=(num_classes, len(moments.mean))) @ factor.T
    labels = np.repeat(np.arange(num_classes), shots)
    images = means[labels] + rng.normal(size=(len(labels), len(moments.mean))) @ factor.T
    return images / np.linalg.norm(images, axis=1, keepdims=True), labels


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)
