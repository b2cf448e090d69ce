"""Every class learnt as a Gaussian around its mean, the model that routes, weighs and answers without training.

It is linear discriminant analysis with partly pooled covariances (Friedman 1989) inside the two-covariance model of
verification (Brümmer and de Villiers 2010): class means are draws from N(ȳ, B), images of a class draws around its
mean with a covariance P that all tasks share. With n_c images of mean μ_c, a further image v of class c has

    v ~ N(a_c, P + B_c),   B_c = B − B (B + P / n_c)⁻¹ B,   a_c = ȳ + B (B + P / n_c)⁻¹ (μ_c − ȳ)    log density ℓ_c

and one of a class never seen v ~ N(ȳ, P + B), log density ℓ₀. In coordinates where P is the identity and B diagonal
all of it is elementwise, so an image costs one linear map and one product with all class means. Beside it stands

    q_c = log N(v; a_c, Q_t),   Q_t = b_t W_t + (1 − b_t) P,   b_t = N_t / (N_t + pooling · E)

with W_t = S_w(t) / N_t of c's own task t. It is not shrunk: what it lacks P gives it, and shrunk towards a multiple of
the identity it chose worse (docs/methods.md). What the densities are used for is in class_answers.py.

The model is a function of the set of tasks learnt: sums over tasks are exact and rows are in the order of the tasks'
keys, so the order of learning changes no bit, and a task taken out leaves the bits of never having had it.

Shapes: N images, E embedding dimensions, T tasks, R classes with images over all tasks.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from diki_ray.answering.own_covariances import OwnCovariance, OwnCovariances
from diki_ray.config.class_model import ClassModelSection
from diki_ray.errors import DataError
from diki_ray.learning.moments import Moments
from diki_ray.learning.statistics import Statistics

SCATTER_GRID = 2.0**-36
"""Within-class scatters are added as whole multiples of it: exact in int64 for the first 10⁸ images, and far below a
float32 feature's own rounding."""
SMALLEST_BETWEEN = 1e-3
"""The variance between class means is taken to be at least this, in units of the variance within: below it nothing
would be told apart."""
COVARIANCE_EPS = 1e-7
"""It is added to the diagonal of the pooled covariance."""
FACTOR_BYTES_AT_ONCE = {"cuda": 2**28}
"""Where densities are computed beside the CPU: not every device knows float64. Where the factors of all tasks take no
more bytes, q_c is computed for all at once: a card does that sooner than it tells the CPU which can still win."""


@dataclass(frozen=True, eq=False)
class LearntClasses:
    """What the model reads of a task's module: its key, the class names [C], the sums over its training images."""

    key: str
    names: tuple[str, ...]
    statistics: Statistics

    def __post_init__(self) -> None:
        if len(self.names) != len(self.statistics.counts):
            raise DataError(f"{len(self.names)} class names, but class means of {len(self.statistics.counts)} classes")

    @property
    def seen(self) -> np.ndarray:
        """int64: the numbers of the classes that have images."""
        return np.flatnonzero(self.statistics.counts)

    @property
    def moments(self) -> Moments:
        return self.statistics.moments

    def scatter(self, within: bool = True) -> np.ndarray:
        """[E, E]: within the classes, or about the task's mean."""
        return self.statistics.scatter_within if within else self.moments.scatter

    def own_covariance(self) -> Tensor:
        """W_t [E, E]."""
        return torch.from_numpy(self.scatter()) / self.moments.count

    @cached_property
    def log_det(self) -> float:
        """log |W_t|; minus infinity where there are too few images for it."""
        if self.moments.count - len(self.seen) < len(self.moments.mean):
            return -math.inf
        factor, failed = torch.linalg.cholesky_ex(self.own_covariance())
        return -math.inf if failed else 2 * float(factor.diagonal().log().sum())


@dataclass(frozen=True, eq=False)
class PooledScatter:
    """Σ_t w_t S_w(t) as int64 multiples of SCATTER_GRID [E, E], with the images that it counts for and how many images
    are not their class's first: adds and subtracts exactly. w_t is 1 up to `most_pooled` images for each dimension."""

    scatter: np.ndarray
    count: int
    num_repeated: int

    @staticmethod
    def of(task: LearntClasses, constants: ClassModelSection) -> PooledScatter:
        images = task.moments.count
        counted = min(images, math.ceil(constants.most_pooled * len(task.moments.mean)))
        scatter = np.rint(task.scatter() * (counted / images / SCATTER_GRID)).astype(np.int64)
        return PooledScatter(scatter, counted, images - len(task.seen))

    def plus(self, other: PooledScatter, sign: int = 1) -> PooledScatter:
        """With another's images, or without them (sign −1)."""
        return PooledScatter(
            self.scatter + sign * other.scatter,
            self.count + sign * other.count,
            self.num_repeated + sign * other.num_repeated,
        )


def _shrunk(scatter: np.ndarray, count: int, eps: float) -> Tensor:
    """OAS-shrunk covariance [E, E] of a scatter about a mean or means, plus ε·I."""
    moments = Moments(max(count, 2), np.zeros(len(scatter)), scatter)
    return torch.from_numpy(moments.covariance(eps, "oas"))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Learnt classes and the candidates of their names, in the order of tasks."""

    row: Tensor  # int64 [P], the learnt class
    candidate: Tensor  # int64 [P]
    task: Tensor  # int64 [P], among the tasks that have a candidate
    tasks: Tensor  # int64 [S], these tasks among `ClassModel.columns`
    lengths: Tensor  # int64 [S], number of pairs of each


class ClassModel:
    """The class densities of a set of learnt tasks. Memory: 16 R E bytes, 32 E² bytes, and up to `factor_bytes` for
    the tasks' own covariances, of which 8 E² bytes are made when an image first needs a task's (0.01 s at E = 512);
    the tasks' moments are read where they are.

    tasks: in the caller's order, which is that of the columns of results. Tasks without images have no density.
    pooled: the sum over all of them where the caller has it; see `with_task`.
    """

    def __init__(
        self,
        tasks: Sequence[LearntClasses],
        constants: ClassModelSection | None = None,
        factor_bytes: float = 2**30,
        pooled: PooledScatter | None = None,
    ) -> None:
        self.tasks = tuple(tasks)
        self.constants = constants or ClassModelSection()
        self._factor_bytes = factor_bytes
        self._factors: OrderedDict[int, OwnCovariance] = OrderedDict()
        self._held_bytes = 0
        self._all_own: OwnCovariances | None = None
        self._copies: dict[torch.device, ClassModel] = {}
        self.pairs = lru_cache(maxsize=8)(self._pairs)
        order = sorted(range(len(tasks)), key=lambda t: tasks[t].key)
        self.columns = [t for t in order if len(tasks[t].seen)]
        """The tasks that have images, as positions in `tasks`, in the order of their keys."""
        self._known = [tasks[t] for t in self.columns]
        self._rows_of: dict[str, list[int]] = defaultdict(list)
        self.num_classes = [len(task.seen) for task in self._known]
        for row, name in enumerate(task.names[c] for task in self._known for c in task.seen):
            self._rows_of[name].append(row)
        self.task_of_row = torch.repeat_interleave(torch.tensor(self.num_classes, dtype=torch.long))
        if self._known:
            parts = (PooledScatter.of(task, self.constants) for task in self._known)
            self.pooled = pooled or next(parts)
            if pooled is None:
                for part in parts:
                    self.pooled = self.pooled.plus(part)
            self._fit()

    def with_task(self, task: LearntClasses) -> ClassModel:
        """The model with a task more, last in order: the bits of a model made of all these tasks, without reading the
        scatters of the others again."""
        if not len(task.seen) or not self._known:
            return ClassModel([*self.tasks, task], self.constants, self._factor_bytes)
        pooled = self.pooled.plus(PooledScatter.of(task, self.constants))
        return ClassModel([*self.tasks, task], self.constants, self._factor_bytes, pooled)

    def without_task(self, position: int) -> ClassModel:
        """The model without a task: the bits of a model that never had it."""
        rest = [task for t, task in enumerate(self.tasks) if t != position]
        if not len(self.tasks[position].seen) or len(self._known) == 1:
            return ClassModel(rest, self.constants, self._factor_bytes)
        pooled = self.pooled.plus(PooledScatter.of(self.tasks[position], self.constants), sign=-1)
        return ClassModel(rest, self.constants, self._factor_bytes, pooled)

    @property
    def device(self) -> torch.device:
        """Where densities are computed: the CPU, where the model is fitted, or where `on` has put a copy."""
        return self.centre.device if self._known else torch.device("cpu")

    def on(self, device: torch.device) -> ClassModel:
        """The model with its tensors on a CUDA card, the same one each time, as long as this one is kept; for any other
        device, which may not know float64, the model itself."""
        if not self._known or device.type not in FACTOR_BYTES_AT_ONCE:
            return self
        if device not in self._copies:
            moved = self._copies[device] = copy.copy(self)
            tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
            vars(moved).update({name: value.to(device) for name, value in tensors.items()})
            moved._factors, moved._held_bytes, moved._all_own, moved._copies = OrderedDict(), 0, None, {}
            moved.pairs = lru_cache(maxsize=8)(moved._pairs)
        return self._copies[device]

    def _fit(self) -> None:
        """P, B, ȳ and the classes' means in the coordinates where P is the identity and B diagonal."""
        embed_dim = len(self._known[0].moments.mean)
        self.centre, self.counts, means = self._class_means()
        self._pooled_covariance = self._covariance_within()
        pooled_factor = torch.linalg.cholesky(self._pooled_covariance)
        self._log_det_pooled = 2 * float(pooled_factor.diagonal().log().sum())
        off_centre = means.sub_(self.centre)  # in place, as below: with a thousand tasks each has 80 MB
        half = torch.linalg.solve_triangular(pooled_factor, off_centre.T @ off_centre, upper=False)
        spread = torch.linalg.solve_triangular(pooled_factor, half.T, upper=False)  # of the means, where P is I
        variances, axes = torch.linalg.eigh(_shrunk(spread.numpy(), len(means), 0.0))
        between = (variances - (1 / self.counts).mean()).clamp(min=SMALLEST_BETWEEN)  # [E]
        self._to_coordinates = torch.linalg.solve_triangular(pooled_factor.T, axes, upper=True)  # [E, E], x ↦ x @ it
        self._from_coordinates = axes.T @ pooled_factor.T
        distinct, self._kind = self.counts.unique(return_inverse=True)
        gain = between / (between + 1 / distinct[:, None])  # n B (n B + 1)⁻¹, [K, E] for K distinct counts
        variance = 1 + between * (1 - gain)  # 1 + B (n B + 1)⁻¹
        self.means = (off_centre @ self._to_coordinates).mul_(self._of_rows(gain))  # a_c − ȳ [R, E]
        self._constant = 0.5 * (embed_dim * math.log(2 * math.pi) + self._log_det_pooled)
        self._precision = 1 / variance
        self._weighted = self.means * self._of_rows(self._precision)
        squared = torch.mul(self._weighted, self.means, out=off_centre).sum(1)
        self._offset = squared + variance.log().sum(1)[self._kind]  # [R]
        self._unseen_precision = 1 / (1 + between)
        self._unseen_offset = float((1 + between).log().sum())

    def _of_rows(self, by_kind: Tensor) -> Tensor:
        """What is known by count [K, E], for all classes [R, E]; [1, E] where they have equally many images."""
        return by_kind if len(by_kind) == 1 else by_kind[self._kind]

    def _class_means(self) -> tuple[Tensor, Tensor, Tensor]:
        """ȳ [E], the counts float64 [R] and the means [R, E]."""
        counts = np.concatenate([task.statistics.counts[task.seen] for task in self._known])
        means = np.concatenate([task.statistics.means[task.seen] for task in self._known])
        return torch.from_numpy(means.mean(axis=0)), torch.from_numpy(counts).double(), torch.from_numpy(means)

    def _covariance_within(self) -> Tensor:
        """P; where no class has a second image nothing tells the scatter within from that between, and each is taken to
        be half of the whole."""
        if self.pooled.num_repeated:
            return _shrunk(self.pooled.scatter * SCATTER_GRID, self.pooled.count, COVARIANCE_EPS)
        whole = np.sum([task.scatter(within=False) for task in self._known], axis=0)
        return _shrunk(0.5 * whole, self.pooled.count, COVARIANCE_EPS)

    def _pairs(self, names: tuple[str, ...]) -> Pairs:
        """The classes learnt among candidates of these names."""
        found = sorted((row, c) for c, name in enumerate(names) for row in self._rows_of.get(name, ()))
        return self._paired(*torch.tensor(found, dtype=torch.long, device=self.device).reshape(-1, 2).T)

    def own_names(self) -> Pairs:
        """Every class learnt with itself."""
        rows = torch.arange(len(self.task_of_row), device=self.device)
        return self._paired(rows, rows)

    def _paired(self, row: Tensor, candidate: Tensor) -> Pairs:
        tasks, task, lengths = self.task_of_row[row].unique_consecutive(return_inverse=True, return_counts=True)
        return Pairs(row, candidate, task, tasks, lengths)

    @property
    def sharpness(self) -> float:
        chosen = self.constants.sharpness
        return 3 / math.sqrt(len(self.centre)) if chosen is None else chosen

    def own_share(self, task: int) -> float:
        """b_t of a task among `columns`."""
        moments = self._known[task].moments
        return moments.count / (moments.count + self.constants.pooling * len(moments.mean))

    def class_log_densities(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """ℓ_c [R, N] and ℓ₀ [N], of features [N, E] float64."""
        y = (features - self.centre) @ self._to_coordinates
        squared = y**2
        by_kind = self._precision @ squared.T  # [K, N]
        distance = by_kind[self._kind] - 2 * self._weighted @ y.T + self._offset[:, None]
        unseen = squared @ self._unseen_precision + self._unseen_offset
        return -0.5 * distance - self._constant, -0.5 * unseen - self._constant

    @cached_property
    def upper_bounds(self) -> Tensor:
        """float64, for each task of `columns`: nowhere below q_c of any image and class of the task, and needs none of
        their factors. log |b W + (1 − b) P| is at least b log |W| + (1 − b) log |P|, for it is concave, and at least
        E log (1 − b) + log |P|."""
        embed_dim = len(self.centre)
        least = []
        for task, learnt in enumerate(self._known):
            b = self.own_share(task)
            mixed = b * learnt.log_det + (1 - b) * self._log_det_pooled
            least.append(max(mixed, self._log_det_pooled + embed_dim * math.log1p(-b)))
        return -0.5 * (torch.tensor(least, dtype=torch.float64, device=self.device) + embed_dim * math.log(2 * math.pi))

    @property
    def own_at_once(self) -> bool:
        """Whether `own_log_densities` is the sooner way to q_c."""
        return 8 * len(self._known) * len(self.centre) ** 2 <= FACTOR_BYTES_AT_ONCE.get(self.device.type, 0)

    def own_log_densities(self, features: Tensor) -> Tensor:
        """q_c [R, N] of all tasks, of features [N, E] float64. Memory: 8 T E² bytes, kept."""
        if self._all_own is None:
            self._all_own = OwnCovariances.of([self._factored(task) for task in range(len(self._known))])
        return self._all_own.log_density(features, self.task_of_row)

    def own(self, task: int) -> OwnCovariance:
        """Q_t of a task among `columns`, factored when first asked for; the longest unused is dropped."""
        found = self._factors.get(task)
        if found is None:
            found = self._factors[task] = self._factored(task)
            self._held_bytes += found.num_bytes
        self._factors.move_to_end(task)
        while len(self._factors) > 1 and self._held_bytes > self._factor_bytes:
            self._held_bytes -= self._factors.popitem(last=False)[1].num_bytes
        return found

    def _factored(self, task: int) -> OwnCovariance:
        learnt, b = self._known[task], self.own_share(task)
        covariance = b * learnt.own_covariance().to(self.device) + (1 - b) * self._pooled_covariance
        factor = torch.linalg.cholesky(covariance)
        centre = torch.from_numpy(learnt.moments.mean).to(self.device)
        means = self.centre + self.means[self.task_of_row == task] @ self._from_coordinates
        whitened = torch.linalg.solve_triangular(factor, (means - centre).T, upper=False)
        log_norm = -float(factor.diagonal().log().sum()) - 0.5 * len(centre) * math.log(2 * math.pi)
        return OwnCovariance(factor, centre, whitened, log_norm)
