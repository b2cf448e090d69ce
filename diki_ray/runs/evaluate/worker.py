"""What looks at test images: a worker that computes features and scores (several of them on Ray: ray_workers.py).

Work is cut the same way for any number of workers, and a piece of it never depends on another, so neither do numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diki_ray.answering.answers import Answers, candidate_tasks, needed_rows
from diki_ray.answering.class_features import Candidates
from diki_ray.answering.configured import build_predictor
from diki_ray.answering.routing import NO_TASK, Routes
from diki_ray.answering.rows import ROWS_AT_ONCE, BestClasses, Rows, Wanted, best_classes, computed_rows
from diki_ray.answering.split_routes import SplitRouter
from diki_ray.config import Config
from diki_ray.data.shards import SkipLedger
from diki_ray.data.stream import eval_batches
from diki_ray.data.to_device import on_device
from diki_ray.learning.module import TaskModule
from diki_ray.runs.plan import PlannedTask, build_method, device_of, load_backbone, precision_of


@dataclass(frozen=True, eq=False)
class ToScore:
    """Rows of one module and one test set, to be scored among the classes of some data sets."""

    rows: np.ndarray  # int64 [M], which they are of the module's
    features: np.ndarray  # float32 [M, E]
    text_weight: np.ndarray  # float64 [M]
    data_sets: tuple[int, ...]


class ToAnswer(NamedTuple):
    """The N images of a test set as they are routed once some tasks are learnt."""

    frozen: np.ndarray  # float32 [N, E]
    features: np.ndarray  # float32 [N, E], under the modules that they are answered with
    task: np.ndarray  # int64 [N]
    weight: np.ndarray  # float64 [N]
    text_weight: np.ndarray  # float64 [N]


class EvaluationWorker:
    """One process's part of an evaluation.

    read_module: the bytes of the module with a digest. asked: the sequences of tasks after which answers are wanted.
    """

    def __init__(
        self,
        config: Config,
        tasks: Sequence[PlannedTask],
        digests: Sequence[str],
        read_module: Callable[[str], bytes],
        split: str,
        asked: Sequence[Sequence[int]],
    ):
        torch.set_num_threads(max(1, int(config.evaluate.cpus_per_worker)))
        backbone = load_backbone(config).to(device_of(config), precision_of(config))
        self.config, self.tasks, self.split, self.asked = config, tasks, split, asked
        modules = [TaskModule.from_bytes(read_module(digest)) for digest in digests]
        self.predictor = build_predictor(config, build_method(config, backbone), modules)
        self.router = SplitRouter.of(config, self.predictor.router)
        self.candidates = [Candidates.of(backbone, t.class_names, t.templates) for t in tasks]

    def do(self, work: Work) -> Any:
        """Does a piece of work, which is one of the methods below with its arguments."""
        return work(self)

    def new_batches(self, task: int, batches: Sequence[int]) -> list[Answers]:
        """Canonical batches of test set `task` of which nothing is known: frozen features, and the rows they need."""
        ledger = SkipLedger(skip_budget(self.config, self.tasks[task], self.split))
        stream = self._read(task, ledger, batches=batches)
        found = []
        for b in on_device(stream, self.predictor.backbone.device):
            sample = np.array(b.positions, np.int64)
            frozen = self.predictor.frozen_features(b.images)
            needed = needed_rows(sample, self.router.routes(frozen, [len(sample)]), self.asked)
            rows = {t: self._rows(t, b.images, sample, w) for t, w in needed.items()}
            zero = np.zeros(len(sample))
            rows[NO_TASK] = Rows(Wanted(sample, zero, zero), frozen.numpy())
            found.append(Answers(b.keys, sample, b.labels.numpy(), {}, rows))
        found[-1].skipped.update(ledger.counts)
        return found

    def more_rows(self, task: int, wanted: Mapping[int, Wanted]) -> dict[int, Rows]:
        """Rows of images of test set `task` whose frozen features are known.

        Raises:
            DataError: an image that could be read before cannot be read any more.
        """
        sample = np.unique(np.concatenate([w.sample for w in wanted.values()]))
        [batch] = on_device(self._read(task, SkipLedger(0), samples=[sample]), self.predictor.backbone.device)
        return {t: self._rows(t, batch.images, sample, w) for t, w in wanted.items()}

    def score(self, module: int, pieces: Sequence[ToScore], errors: Mapping[int, float]) -> list[list[BestClasses]]:
        """For rows of one module (NO_TASK: the frozen model) their best among the classes of each data set.

        errors: of the tabulated class features of data sets, where they are known.
        """
        known = dict(errors)
        return [[self._scores(module, piece, c, known) for c in piece.data_sets] for piece in pieces]

    def answer_by_set(self, learnt: Sequence[int], test_sets: Sequence[ToAnswer]) -> list[BestClasses]:
        """The answers for every test set once some tasks are learnt, where they depend on all of these."""
        space, num_tasks = self.config.evaluate.label_space, len(self.tasks)
        found = []
        for j, images in enumerate(test_sets):
            among = [self.candidates[c] for c in candidate_tasks(space, j, learnt, num_tasks)]
            parts = []
            for frozen, features, *routes in zip(
                *(torch.from_numpy(a).split(ROWS_AT_ONCE) for a in images), strict=True
            ):
                logits = self.predictor.answer_logits(features, frozen, Routes(*routes), among, learnt)
                parts.append(BestClasses.of(logits))
            found.append(BestClasses.joined(parts))
        return found

    def _read(self, task: int, ledger: SkipLedger, **chosen: Any) -> Iterator[Any]:
        return eval_batches(
            self.tasks[task].index,
            self.split,
            batch_size=self.config.evaluate.batch_size,
            transform=self.predictor.backbone.preprocess,
            num_threads=self.config.data.num_threads,
            ledger=ledger,
            **chosen,
        )

    def _rows(self, module: int, images: Tensor, sample: np.ndarray, wanted: Wanted) -> Rows:
        return computed_rows(self.predictor, module, images, sample, wanted, self.config.evaluate.batch_size)

    def _scores(self, module: int, rows: ToScore, data_set: int, errors: dict[int, float]) -> BestClasses:
        candidates = self.candidates[data_set]
        found = best_classes(self.predictor, module, rows.features, rows.text_weight, candidates)
        if data_set not in errors:
            interpolated = self.predictor.interpolated(module, candidates)
            errors[data_set] = self.predictor.interpolation_error(module, candidates) if interpolated else 0.0
        return replace(found, error=errors[data_set])


Work = Callable[[EvaluationWorker], Any]
Workers = Callable[[Sequence[Work]], Iterator[tuple[int, Any]]]
"""Does pieces of work and gives (its number, what came of it), as they are done. Nothing is started for no work."""


def in_this_process(start: Callable[[], EvaluationWorker]) -> Workers:
    """One worker here, made when there is something to do."""
    workers: list[EvaluationWorker] = []

    def work_through(work: Sequence[Work]) -> Iterator[tuple[int, Any]]:
        if work and not workers:
            workers.append(start())
        for number, piece in enumerate(work):
            yield number, workers[0].do(piece)

    return work_through


def skip_budget(config: Config, task: PlannedTask, split: str) -> int:
    """How many images of a test set may be unreadable."""
    return int(config.data.max_skipped_fraction * task.index.split(split).num_samples)
