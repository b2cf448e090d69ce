"""The accuracy matrix over Ray: workers take whole canonical batches, so the numbers are the same for any number of
workers, and every prefix of the stream is answered in one pass over the test images (diki_ray.answering.answers).

What was computed is kept in the run's storage by what it depends on: frozen features by (backbone, test data), answers
by module digests and calibration. Evaluating again, or after one more task, computes what is new.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import ray
import torch

from diki_ray.answering.answers import (
    Answers,
    Prediction,
    answer,
    block_tasks,
    candidate_tasks,
    needed_routes,
    predict_along,
)
from diki_ray.answering.class_features import Candidates
from diki_ray.answering.configured import build_predictor
from diki_ray.answering.metrics import Metrics
from diki_ray.config import Config
from diki_ray.data.shards import SkipLedger
from diki_ray.data.stream import eval_batches
from diki_ray.data.to_device import on_device
from diki_ray.errors import DataError, UserError
from diki_ray.learning.methods import METHODS
from diki_ray.learning.module import TaskModule, read_tensors, write_tensors
from diki_ray.runs.plan import (
    Plan,
    PlannedTask,
    answered_along,
    build_method,
    device_of,
    load_backbone,
    precision_of,
    with_absolute_paths,
)
from diki_ray.store import caches
from diki_ray.store.interface import HeldRun

BATCHES_PER_UNIT = 2


@dataclass(frozen=True, eq=False)
class Part:
    """What a worker computed for some canonical batches of one test set, or for all of them."""

    batches: tuple[int, ...]
    counts: tuple[int, ...]
    """Images of each batch; less than its size where samples were skipped."""
    keys: tuple[str, ...]
    features: np.ndarray  # float32 [N, E], frozen
    answers: Answers
    along: tuple[Prediction, ...] = ()
    """Where answers are computed along the stream (`plan.answered_along`): the predictions after each task of it."""
    skipped: dict[str, int] = field(default_factory=dict)

    def only(self, batch: int) -> Part:
        """One batch of it."""
        at = self.batches.index(batch)
        rows = slice(sum(self.counts[:at]), sum(self.counts[: at + 1]))
        return Part((batch,), (self.counts[at],), self.keys[rows], self.features[rows], self.answers.rows(rows))

    @staticmethod
    def joined(parts: Sequence[Part]) -> Part:
        """Parts of one test set, in the order of their batches."""
        parts = sorted(parts, key=lambda p: p.batches)
        along = zip(*(p.along for p in parts), strict=True)
        skipped: dict[str, int] = {}
        for p in parts:
            for reason, count in p.skipped.items():
                skipped[reason] = skipped.get(reason, 0) + count
        return Part(
            tuple(b for p in parts for b in p.batches),
            tuple(c for p in parts for c in p.counts),
            tuple(k for p in parts for k in p.keys),
            np.concatenate([p.features for p in parts]),
            Answers.concatenated([p.answers for p in parts]),
            tuple(Prediction.concatenated(p) for p in along),
            skipped,
        )


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The accuracy matrix [T, T], the zero-shot row [T], and for each test set what they come from."""

    accuracy: np.ndarray
    zero_shot: np.ndarray
    metrics: Metrics
    test_sets: tuple[Part, ...]
    zero_shot_predictions: tuple[Prediction, ...]
    predictions: tuple[tuple[Prediction, ...], ...]
    """[test set][tasks learnt − 1]"""


class Evaluating:
    """One process's part of an evaluation; a Ray actor around it is `EvalWorker`, tests call it directly.

    read_module: the bytes of the module with a digest (the store client's method).
    orders: the orders of the tasks whose prefixes are to be answered (`image` routing); the stream's own by default.
    """

    def __init__(
        self,
        config: Config,
        tasks: Sequence[PlannedTask],
        digests: Sequence[str],
        read_module: Callable[[str], bytes],
        split: str = "test",
        orders: Sequence[Sequence[int]] | None = None,
    ):
        torch.set_num_threads(max(1, int(config.evaluate.cpus_per_worker)))
        backbone = load_backbone(config).to(device_of(config), precision_of(config))
        self.config, self.tasks, self.split = config, tasks, split
        self.orders = [range(len(tasks))] if orders is None else orders
        modules = [TaskModule.from_bytes(read_module(digest)) for digest in digests]
        self.predictor = build_predictor(config, build_method(config, backbone), modules)
        self.candidates = [Candidates.of(backbone, t.class_names, t.templates) for t in tasks]

    def evaluate(self, task: int, batches: Sequence[int], known: Part | None = None) -> Part:
        """Answers the canonical batches of test set `task`; `known` holds what is known of exactly these batches."""
        ledger = SkipLedger(self._skip_budget(task))
        stream = eval_batches(
            self.tasks[task].index,
            self.split,
            batch_size=self.config.evaluate.batch_size,
            transform=self.predictor.backbone.preprocess,
            batches=batches,
            num_threads=self.config.data.num_threads,
            ledger=ledger,
        )
        parts = [
            self._batch(task, b.step, b.images, b.labels.numpy(), b.keys, None if known is None else known.only(b.step))
            for b in on_device(stream, self.predictor.backbone.device)
        ]
        joined = Part.joined(parts)
        joined.skipped.update(ledger.counts)
        return joined

    def _skip_budget(self, task: int) -> int:
        return int(self.config.data.max_skipped_fraction * self.tasks[task].index.split(self.split).num_samples)

    def _batch(
        self,
        task: int,
        number: int,
        images: torch.Tensor,
        labels: np.ndarray,
        keys: tuple[str, ...],
        known: Part | None,
    ) -> Part:
        space, num_tasks = self.config.evaluate.label_space, len(self.tasks)
        block_of = block_tasks(space, task, num_tasks)
        blocks = [self.candidates[t] for t in block_of]
        if known is None:
            features = self.predictor.frozen_features(images)
            answers = Answers.empty(labels, num_tasks, len(blocks), self.predictor.method.answering)
        else:
            features, answers = torch.from_numpy(known.features), known.answers
        scores = self.predictor.scores(features)
        answers.log_density[:] = scores.log_density.numpy()
        answers.weight[:] = scores.weight.numpy()
        along: list[Prediction] = []
        orders = self.orders
        if answered_along(self.config):
            orders = []  # the table then only holds the frozen model's answers
            after = [candidate_tasks(space, task, range(n), num_tasks) for n in range(1, num_tasks + 1)]
            columns = [[block_of.index(t) for t in candidates] for candidates in after]
            if len(labels):
                along = predict_along(self.predictor, images, features, blocks, after, columns)
        needed = needed_routes(answers.log_density, orders, answers.answering)
        answer(self.predictor, images, features, answers, blocks, needed)
        return Part((number,), (len(labels),), keys, features.numpy(), answers, tuple(along))

    def interpolation_error(self) -> float:
        """The largest error of a tabulated class feature over all (task, candidates) tables that were used."""
        by_key = {c.key: c for c in self.candidates}
        return max((self.predictor.interpolation_error(t, by_key[k]) for t, k in self.predictor.tables()), default=0.0)


EvalWorker: Any = ray.remote(max_restarts=3, max_task_retries=3)(Evaluating)


def evaluate(
    plan: Plan, store: HeldRun, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Evaluation, dict[str, Any]]:
    """The accuracy matrix of the plan's stream from the committed modules, and notes about how it was made.

    on_progress: called with (canonical batches done, in all).

    Raises:
        DataError: a test set is missing, or more of it than allowed could not be read.
    """
    config, tasks = plan.config, plan.tasks
    entries = {entry.key: entry for entry in store.modules()}
    digests = [entries[t.key].digest for t in tasks]
    kept = [Cache(plan, caches.Cache.open(store.storage), j, digests) for j in range(len(tasks))]
    known = [cache.load() for cache in kept]
    num_batches = [num_batches_of(config, t) for t in tasks]
    use_gpu = device_of(config) == "cuda"
    worker = EvalWorker.options(num_cpus=config.evaluate.cpus_per_worker, num_gpus=1 if use_gpu else 0)
    located = with_absolute_paths(config)
    workers = [worker.remote(located, tasks, digests, store.read_module) for _ in range(config.evaluate.num_workers)]
    try:
        parts: list[list[Part]] = [[] for _ in tasks]
        done, total = 0, sum(num_batches)
        on_progress(done, total)
        for j, part in _work_through(workers, num_batches, known):
            parts[j].append(part)
            done += len(part.batches)
            on_progress(done, total)
        error = max(ray.get([w.interpolation_error.remote() for w in workers]))
    finally:
        for w in workers:
            ray.kill(w)
    test_sets = [Part.joined(p) for p in parts]
    for j, cache in enumerate(kept):
        cache.save(test_sets[j])
    notes = {"text_feature_error": error, "text_grid": config.evaluate.text_grid}
    return accuracy_of(config, tasks, test_sets), notes


def _work_through(
    workers: Sequence[Any], num_batches: Sequence[int], known: Sequence[Part | None]
) -> Iterator[tuple[int, Part]]:
    """(test set, part) as they are done; a worker that is free takes the next batches."""
    units = [
        (j, list(range(first, min(first + BATCHES_PER_UNIT, n))))
        for j, n in enumerate(num_batches)
        for first in range(0, n, BATCHES_PER_UNIT)
    ]
    waiting, free = units[::-1], list(workers)
    running: dict[Any, tuple[int, Any]] = {}
    while waiting or running:
        while waiting and free:
            j, batches = waiting.pop()
            here = known[j]
            part = None if here is None else Part.joined([here.only(b) for b in batches])
            w = free.pop()
            running[w.evaluate.remote(j, batches, part)] = (j, w)
        ready, _ = ray.wait(list(running), num_returns=1)
        j, w = running.pop(ready[0])
        free.append(w)
        try:
            part = ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            # Ray's own text is the worker's traceback; what the user can put right is said in the cause.
            raise (error.cause if isinstance(error.cause, UserError) else error) from None
        yield j, part


def accuracy_of(config: Config, tasks: Sequence[PlannedTask], test_sets: Sequence[Part]) -> Evaluation:
    """The accuracy matrix from the answers, by indexing."""
    space, num_tasks = config.evaluate.label_space, len(tasks)
    names = [t.class_names for t in tasks]
    accuracy, zero_shot = np.zeros((num_tasks, num_tasks)), np.zeros(num_tasks)
    predictions, frozen = [], []
    for j, part in enumerate(test_sets):
        if not len(part.answers.labels):
            raise DataError(f"task {tasks[j].name!r}: its test split has no readable image.")
        block_of = block_tasks(space, j, num_tasks)

        def after(learnt: range, part: Part = part, j: int = j, block_of: list[int] = block_of) -> Prediction:
            candidates = candidate_tasks(space, j, learnt, num_tasks)
            return part.answers.predict(learnt, candidates, [block_of.index(t) for t in candidates])

        stream = list(part.along) or [after(range(i + 1)) for i in range(num_tasks)]
        frozen.append(after(range(0)))
        predictions.append(tuple(stream))
        labels = part.answers.labels
        accuracy[:, j] = [p.correct(labels, j, names).mean() for p in stream]
        zero_shot[j] = frozen[-1].correct(labels, j, names).mean()
    return Evaluation(accuracy, zero_shot, Metrics.of(accuracy), tuple(test_sets), tuple(frozen), tuple(predictions))


def num_batches_of(config: Config, task: PlannedTask, split: str = "test") -> int:
    return -(-task.index.split(split).num_samples // config.evaluate.batch_size)


class Cache:
    """What earlier evaluations computed of one split: features by data, answers by modules and calibration."""

    def __init__(self, plan: Plan, store: caches.Cache, task: int, digests: Sequence[str], split: str = "test"):
        config, self.store, self.digests = plan.config, store, list(digests)
        self.answering = METHODS[config.method.name].answering
        self.num_blocks = len(block_tasks(config.evaluate.label_space, task, len(plan.tasks)))
        data = {
            "backbone": plan.backbone_digest,
            "precision": str(precision_of(config)),
            "data": plan.tasks[task].index.digest(split),
            "split": split,
            "batch_size": config.evaluate.batch_size,
        }
        blocks = block_tasks(config.evaluate.label_space, task, len(plan.tasks))
        answers = data | {
            "calibration": config.calibration.model_dump(),
            "statistics": config.statistics.model_dump(),
            "text_grid": config.evaluate.text_grid,
            "skip_weight": config.evaluate.skip_weight,
            "candidates": [(plan.tasks[t].class_names, plan.tasks[t].templates) for t in blocks],
        }
        self.features_name = f"features-{_digest(data)}.safetensors"
        self.answers_name = f"answers-{_digest(answers)}.safetensors"

    def load(self) -> Part | None:
        """The known features, with the answers known for the modules of this stream; None when nothing is."""
        self._loaded: np.ndarray | None = None
        blob = self.store.get(self.features_name)
        if blob is None:
            return None
        header, arrays = read_tensors(blob)
        answers = Answers.empty(arrays["labels"], len(self.digests), self.num_blocks, self.answering)
        if (blob := self.store.get(self.answers_name)) is not None:
            known, columns = read_tensors(blob)
            for name in ("answered", "best_logit", "best_class", "log_sum"):
                here, there = vars(answers)[name], columns[name]
                here[:, -1] = there[:, -1]
                for t, digest in enumerate(self.digests):
                    if digest in known["digests"]:
                        here[:, t] = there[:, known["digests"].index(digest)]
        self._loaded = answers.answered.copy()
        batches, counts = tuple(header["batches"]), tuple(header["counts"])
        return Part(batches, counts, tuple(header["keys"]), arrays["features"], answers, (), header["skipped"])

    def save(self, part: Part) -> None:
        """Keeps the part, where something in it is new."""
        if self._loaded is not None and np.array_equal(self._loaded, part.answers.answered):
            return
        header = {"batches": part.batches, "counts": part.counts, "keys": part.keys, "skipped": part.skipped}
        arrays = {"features": part.features, "labels": part.answers.labels}
        self.store.put(self.features_name, write_tensors(header, arrays))
        columns = {name: vars(part.answers)[name] for name in ("answered", "best_logit", "best_class", "log_sum")}
        self.store.put(self.answers_name, write_tensors({"digests": self.digests}, columns))


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=asdict).encode()).hexdigest()[:32]
