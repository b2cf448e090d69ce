"""What the class densities of class_model.py are used for: an image's task, the weight of its module, the answer.

    task      log p(v | t) = logsumexp_c ℓ'_c over its classes, ℓ'_c = (1 − κ) ℓ_c + κ q_c
    weight    w_t = σ(log mean_c exp ℓ_c − ℓ₀): learnt against never seen, so its threshold is 0 on every backbone

The answer among candidates with zero-shot logits z (at the backbone's own scale) is decided in three steps, each by the
density that tells most there:

    learnt or not     the candidates learnt have logsumexp_c (γ (ℓ_c − ℓ₀) + z_c) together, one that no task knows z_c
    which task        of what is learnt, softmax_t logsumexp_c (ℓ'_c + z_c)
    which class       within a task, softmax_c (q_c + λ z_c)

with κ `own_covariance`, γ `likelihood_ratio` and λ `zero_shot_within`.

A class that several tasks know by one name has its share from each of them, by that task's own mean: with one mean for
all, which two tasks of one domain would gain a little by, two domains under the same names lost most answers. Where no
candidate is learnt the answer is the zero-shot one, bit for bit.

q_c needs a factor for each task, so it is computed only for the tasks that can still win an image: it is bounded from
above (`ClassModel.upper_bounds`), and with it every score. The best task and answer are those of computing all. On a
card all are computed while their factors fit (`ClassModel.own_at_once`).

Shapes: N images, T tasks, R learnt classes, C candidates, P pairs of a learnt class and a candidate of its name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diki_ray.answering.class_model import ClassModel, Pairs
from diki_ray.errors import DataError

NEGLIGIBLE = 20.0
"""Natural logarithm: an answer that is this far below the best one has a confidence of 2·10⁻⁹, and keeps its bound."""


def segment_logsumexp(values: Tensor, lengths: Tensor) -> Tensor:
    """logsumexp [S, N] over the S runs of rows of values [P, N]; no run is empty."""
    top = torch.segment_reduce(values, "max", lengths=lengths, axis=0)
    shifted = (values - top.repeat_interleave(lengths, 0)).exp()
    return top + torch.segment_reduce(shifted, "sum", lengths=lengths, axis=0).log()


class ClassDensities:
    """The densities of N images under all classes learnt. Memory: 16 R N bytes, and as much while it answers.

    features: [N, E], the frozen model's, L2-normalised.

    Raises:
        DataError: a feature that is not finite.
    """

    def __init__(self, model: ClassModel, features: Tensor) -> None:
        self.model = model
        if not torch.isfinite(features).all():
            row = int(torch.isfinite(features).all(1).int().argmin())
            raise DataError(
                f"the features of image {row} of {len(features)} are not finite numbers: look at that image"
            )
        self._features = features.to(model.device, torch.float64)
        self._num_tasks = len(model.columns)
        if not self._num_tasks:
            return
        self._lengths = torch.tensor(model.num_classes, device=model.device)
        self._starts = [0, *self._lengths.cumsum(0).tolist()]
        self.pooled, self.unseen = model.class_log_densities(self._features)
        """ℓ_c [R, N] and ℓ₀ [N]."""
        # q_c [R, N], its bound where not done.
        if model.own_at_once:
            self._own = model.own_log_densities(self._features)
        else:
            self._own = model.upper_bounds[model.task_of_row][:, None].repeat(1, len(features))
        self._done = torch.full((self._num_tasks, len(features)), model.own_at_once, device=model.device)

    def log_density(self) -> Tensor:
        """log p(v | t) [N, T] float64, columns in the order of the model's tasks: exact for the best task, minus
        infinity for a task that cannot be the best and for one without images."""
        out = torch.full((len(self._features), len(self.model.tasks)), -torch.inf, dtype=torch.float64)
        if self._num_tasks:
            score = self._scores(self.model.own_names(), 0.0, 0.0)
            out[:, self.model.columns] = score.where(self._done, -torch.inf).T.cpu()
        return out

    def weight(self) -> Tensor:
        """The integration weight [N, T] of each task's module, float64; 0 for a task without images."""
        out = torch.zeros(len(self._features), len(self.model.tasks), dtype=torch.float64)
        if self._num_tasks:
            mean = segment_logsumexp(self.pooled, self._lengths) - self._lengths[:, None].log()
            out[:, self.model.columns] = torch.sigmoid(mean - self.unseen).T.cpu()
        return out

    def logits(self, zero_shot: Tensor, names: Sequence[str]) -> Tensor:
        """[N, C] in the dtype of the zero-shot logits [N, C] of candidates of these names. A candidate that no task
        knows keeps its zero-shot logit, and the others are relative to it; all are times the model's sharpness."""
        pairs = self.model.pairs(tuple(names)) if self._num_tasks else None
        if pairs is None or not len(pairs.row):
            return zero_shot
        constants, z = self.model.constants, zero_shot.to(self.model.device, torch.float64).T
        between = constants.zero_shot_between * z
        ratio = constants.likelihood_ratio * (self.pooled[pairs.row] - self.unseen)
        learnt = (ratio + between[pairs.candidate]).logsumexp(0)
        score = self._scores(pairs, between[pairs.candidate], NEGLIGIBLE / self.model.sharpness)
        score += learnt - score.logsumexp(0)
        within = self._own[pairs.row] + constants.zero_shot_within * z[pairs.candidate]
        share = within - segment_logsumexp(within, pairs.lengths)[pairs.task]
        candidate, order = pairs.candidate.sort(stable=True)
        distinct, lengths = candidate.unique_consecutive(return_counts=True)
        between[distinct] = segment_logsumexp((score[pairs.task] + share)[order], lengths)
        return (self.model.sharpness * between.T).to(zero_shot.device, zero_shot.dtype)

    def _scores(self, pairs: Pairs, between: Tensor | float, margin: float) -> Tensor:
        """logsumexp over a task's pairs of ℓ'_c + between [S, N]: exact for the best of each image and for those within
        `margin` of it; the others are below and may be upper bounds."""
        share = self.model.constants.own_covariance
        rest = (1 - share) * self.pooled[pairs.row] + between
        score = segment_logsumexp(rest + share * self._own[pairs.row], pairs.lengths)
        starts = [0, *pairs.lengths.cumsum(0).tolist()]
        while True:
            done = self._done[pairs.tasks]
            best = score.where(done, -torch.inf).max(0).values
            needed = (score > best - margin) & ~done
            if not needed.any():
                return score
            unresolved = needed.any(0) & ~done.any(0)  # the most promising first: what it reaches rules out most others
            if unresolved.any():
                first = torch.zeros_like(needed).scatter_(0, score.argmax(0, keepdim=True), True)
                needed = first & unresolved
            for s in needed.any(1).nonzero().flatten().tolist():
                images = needed[s].nonzero().flatten()
                self._compute_own(int(pairs.tasks[s]), images)
                own = slice(starts[s], starts[s + 1])
                mixed = rest[own, images] + share * self._own[pairs.row[own]][:, images]
                score[s, images] = mixed.logsumexp(0)

    def _compute_own(self, task: int, images: Tensor) -> None:
        rows = slice(self._starts[task], self._starts[task + 1])
        self._own[rows, images] = self.model.own(task).log_density(self._features[images])
        self._done[task, images] = True
