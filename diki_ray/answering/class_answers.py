"""What the class densities of class_model.py are used for: an image's task, the weight of its module, the answer.

    task      log p(v | t) = logsumexp_c ℓ'_c over its classes, ℓ'_c = (1 − κ) ℓ_c + κ q_c
    weight    w_t = σ(log mean_c exp ℓ_c − ℓ₀): learnt against never seen, so its threshold is 0 on every backbone
    answer    a task's score among the candidates is logsumexp_c (ℓ'_c + z_c), shared out within it by
              softmax(q_c + λ z_c); a candidate that no task knows has ℓ₀ + z_c

with z the zero-shot logits at the backbone's own scale, κ `own_covariance` and λ `zero_shot_within`.
A class that several tasks know by one name has its share from each of them. Where no candidate is learnt the answer is
the zero-shot one, bit for bit.

q_c needs a factor for each task, so it is computed only for the tasks that can still win an image: it is bounded from
above (`ClassModel.upper_bound`), and with it every score. The best task and answer are those of computing all.

Shapes: N images, T tasks, R learnt classes, C candidates, P pairs of a learnt class and a candidate of its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diki_ray.answering.class_model import ClassModel
from diki_ray.errors import DataError

NEGLIGIBLE = 20.0
"""Natural logarithm: an answer that is this far below the best one has a confidence of 2·10⁻⁹, and keeps its bound."""


def segment_logsumexp(values: Tensor, lengths: Tensor) -> Tensor:
    """logsumexp [S, N] over the S runs of rows of values [P, N]; no run is empty."""
    top = torch.segment_reduce(values, "max", lengths=lengths, axis=0)
    shifted = (values - top.repeat_interleave(lengths, 0)).exp()
    return top + torch.segment_reduce(shifted, "sum", lengths=lengths, axis=0).log()


@dataclass(frozen=True, eq=False)
class Pairs:
    """Learnt classes and the candidates of their names, in the order of tasks."""

    row: Tensor  # int64 [P], the learnt class
    candidate: Tensor  # int64 [P]
    task: Tensor  # int64 [P], among the tasks that have a candidate
    tasks: Tensor  # int64, these tasks among `ClassModel.columns`
    lengths: Tensor  # int64, number of pairs of each

    @staticmethod
    def of(model: ClassModel, names: Sequence[str]) -> Pairs:
        found = sorted((row, c) for c, name in enumerate(names) for row in model.rows_of.get(name, ()))
        row, candidate = torch.tensor(found, dtype=torch.long).reshape(-1, 2).T
        tasks, task, lengths = model.task_of_row[row].unique_consecutive(return_inverse=True, return_counts=True)
        return Pairs(row, candidate, task, tasks, lengths)


class ClassDensities:
    """The densities of N images under all classes learnt. Memory: 16 R N bytes, and as much while it answers.

    features: [N, E], the frozen model's, L2-normalised.

    Raises:
        DataError: a feature that is not finite.
    """

    def __init__(self, model: ClassModel, features: Tensor) -> None:
        self.model = model
        self._features = features.double().cpu()
        if not torch.isfinite(self._features).all():
            row = int(torch.isfinite(self._features).all(1).int().argmin())
            raise DataError(
                f"the features of image {row} of {len(features)} are not finite numbers: look at that image"
            )
        self._num_tasks = len(model.columns)
        if not self._num_tasks:
            return
        self._lengths = torch.tensor(model.num_classes)
        self.pooled, self.unseen = model.class_log_densities(self._features)
        """ℓ_c [R, N] and ℓ₀ [N]."""
        bounds = torch.tensor([model.upper_bound(t) for t in range(self._num_tasks)], dtype=torch.float64)
        self._own = bounds[model.task_of_row][:, None].repeat(1, len(features))  # q_c [R, N], its bound where not done
        self._done = torch.zeros(self._num_tasks, len(features), dtype=torch.bool)

    def log_density(self) -> Tensor:
        """log p(v | t) [N, T] float64, columns in the order of the model's tasks: exact for the best task, minus
        infinity for a task that cannot be the best and for one without images."""
        out = torch.full((len(self._features), len(self.model.tasks)), -torch.inf, dtype=torch.float64)
        if self._num_tasks:
            score = self._resolved(lambda: segment_logsumexp(self._mixed(), self._lengths), 0.0)
            out[:, self.model.columns] = score.where(self._done, -torch.inf).T
        return out

    def weight(self) -> Tensor:
        """The integration weight [N, T] of each task's module, float64; 0 for a task without images."""
        out = torch.zeros(len(self._features), len(self.model.tasks), dtype=torch.float64)
        if self._num_tasks:
            mean = segment_logsumexp(self.pooled, self._lengths) - self._lengths[:, None].log()
            out[:, self.model.columns] = torch.sigmoid(mean - self.unseen).T
        return out

    def logits(self, zero_shot: Tensor, names: Sequence[str]) -> Tensor:
        """[N, C] in the dtype of the zero-shot logits [N, C] of candidates of these names. A candidate that no task
        knows keeps its zero-shot logit (times `sharpness`), the others are relative to it."""
        pairs = Pairs.of(self.model, names) if self._num_tasks else None
        if pairs is None or not len(pairs.row):
            return zero_shot
        constants, z = self.model.constants, zero_shot.double().cpu().T
        between = constants.zero_shot_between * z
        between_pairs = between[pairs.candidate]
        # Relative to ℓ₀; a task counts where its score comes near the best of the others' and of what is not learnt.
        known = torch.zeros(len(names), dtype=torch.bool).index_fill(0, pairs.candidate, True)
        floor = between[~known].max(0).values + self.unseen if not known.all() else None
        score = self._resolved(
            lambda: segment_logsumexp(self._mixed()[pairs.row] + between_pairs, pairs.lengths),
            NEGLIGIBLE / constants.sharpness,
            pairs.tasks,
            floor,
        )
        within = self._own[pairs.row] + constants.zero_shot_within * z[pairs.candidate]
        share = within - segment_logsumexp(within, pairs.lengths)[pairs.task]
        candidate, order = pairs.candidate.sort(stable=True)
        distinct, lengths = candidate.unique_consecutive(return_counts=True)
        between[distinct] = segment_logsumexp((score[pairs.task] + share)[order], lengths) - self.unseen
        return (constants.sharpness * between.T).to(zero_shot.dtype).to(zero_shot.device)

    def _mixed(self) -> Tensor:
        """ℓ'_c [R, N], or its upper bound."""
        share = self.model.constants.own_covariance
        return (1 - share) * self.pooled + share * self._own

    def _resolved(
        self, scores: Callable[[], Tensor], margin: float, tasks: Tensor | None = None, floor: Tensor | None = None
    ) -> Tensor:
        """Scores [S, N] of the tasks (all by default), exact for the best of each image and for those within `margin`
        of it; the others are below and may be upper bounds. floor [N]: a score that others have already."""
        tasks = torch.arange(self._num_tasks) if tasks is None else tasks
        while True:
            score, done = scores(), self._done[tasks]
            best = score.where(done, -torch.inf).max(0).values
            if floor is not None:
                best = best.maximum(floor)
            needed = (score > best - margin) & ~done
            if not needed.any():
                return score
            unresolved = needed.any(0) & ~done.any(0)  # the most promising first: what it reaches rules out most others
            if unresolved.any():
                first = torch.zeros_like(needed).scatter_(0, score.argmax(0, keepdim=True), True)
                needed = first & unresolved
            self._compute_own(tasks, needed)

    def _compute_own(self, tasks: Tensor, needed: Tensor) -> None:
        for s in needed.any(1).nonzero().flatten().tolist():
            task, images = int(tasks[s]), needed[s].nonzero().flatten()
            rows = (self.model.task_of_row == task).nonzero()
            self._own[rows, images] = self.model.own(task).log_density(self._features[images])
            self._done[task, images] = True
