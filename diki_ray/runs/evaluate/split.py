"""One split of a stream's data sets, evaluated: what is known of it is taken from the storage's cache, images that miss
something are read, and what is new is kept.

Adding a task to a stream reads its test set, and of the others the images that are rerouted to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from diki_ray.answering.answers import Answers, candidate_tasks
from diki_ray.answering.configured import answers_by_set, build_router
from diki_ray.answering.evaluation import Evaluation
from diki_ray.answering.routing import NO_TASK
from diki_ray.answering.rows import BestClasses, Rows, Wanted
from diki_ray.answering.split_routes import RoutesAfter, SplitRouter
from diki_ray.errors import DataError
from diki_ray.learning.module import TaskModule
from diki_ray.runs.evaluate.cache import AnswerCache, CacheStore, score_keys
from diki_ray.runs.evaluate.worker import (
    EvaluationWorker,
    ToAnswer,
    ToScore,
    Work,
    Workers,
    in_this_process,
    skip_budget,
)
from diki_ray.runs.plan import Plan
from diki_ray.runs.progress import BATCHES, SCORES, TOGETHER, OnProgress, counted
from diki_ray.store.interface import ReadableRun

BATCHES_PER_PIECE = 2


def digests_of(plan: Plan, store: ReadableRun) -> list[str]:
    """The digests of the modules of a plan's tasks, all of which are committed."""
    entries = {entry.key: entry for entry in store.modules()}
    return [entries[task.key].digest for task in plan.tasks]


def evaluate_here(
    plan: Plan,
    digests: Sequence[str],
    read_module: Callable[[str], bytes],
    orders: Sequence[Sequence[int]],
    split: str,
    cache: CacheStore,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Evaluation:
    """A split along some orders of the plan's tasks, in this process. digests: those of the tasks' modules.

    Raises:
        DataError: a test set is missing, or more of it than allowed could not be read.
    """
    asked = prefixes(orders)
    workers = in_this_process(partial(EvaluationWorker, plan.config, plan.tasks, digests, read_module, split, asked))
    return SplitEvaluation(plan, digests, read_module, split, asked, cache).by(workers, on_progress)


def prefixes(orders: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """What is learnt at each step of some orders, from nothing on."""
    return list(dict.fromkeys(tuple(order[:n]) for order in orders for n in range(len(order) + 1)))


class SplitEvaluation:
    """An evaluation under way: `asked` are the sequences of tasks after which answers are wanted."""

    def __init__(
        self,
        plan: Plan,
        digests: Sequence[str],
        read_module: Callable[[str], bytes],
        split: str,
        asked: Sequence[tuple[int, ...]],
        cache: CacheStore,
    ):
        self.plan, self.split, self.asked = plan, split, asked
        modules = [TaskModule.from_bytes(read_module(digest)) for digest in digests]
        self.router = SplitRouter.of(plan.config, build_router(plan.config, plan.embed_dim, modules))
        self.caches = [AnswerCache(plan, cache, j, digests, split) for j in range(len(plan.tasks))]
        kept = cache.names()
        self.known = [c.load(kept) for c in self.caches]
        self.routes: list[RoutesAfter] = []
        self.key_of = score_keys(plan)
        self.by_set = answers_by_set(plan.config)

    def by(self, workers: Workers, on_progress: OnProgress) -> Evaluation:
        """Has workers do what is missing."""
        self._read_images(workers, on_progress)
        error = self._score(workers, on_progress)
        answers = self._answers()
        for cache, found in zip(self.caches, answers, strict=True):
            cache.save(found)
        names = [t.class_names for t in self.plan.tasks]
        return Evaluation(answers, names, self.plan.config.evaluate.label_space, self.routes, self.key_of, error)

    def _answers(self) -> list[Answers]:
        return [known for known in self.known if known is not None]

    def _read_images(self, workers: Workers, on_progress: OnProgress) -> None:
        new = [(j, batches) for j, known in enumerate(self.known) if known is None for batches in self._batches(j)]
        routes = [None if known is None else self._routes(known) for known in self.known]
        missing = [piece for j, after in enumerate(routes) if after for piece in self._missing(j, after)]
        work: list[Work] = [partial(EvaluationWorker.new_batches, task=j, batches=batches) for j, batches in new]
        work += [partial(EvaluationWorker.more_rows, task=j, wanted=wanted) for j, wanted in missing]
        sizes = [len(batches) for _, batches in new] + [1] * len(missing)
        found = dict(counted(workers(work), sizes, BATCHES, on_progress))
        for j in dict.fromkeys(j for j, _ in new):
            self.known[j] = self._joined(j, [b for n, (k, _) in enumerate(new) if k == j for b in found[n]])
        self._add([(j, found[len(new) + n]) for n, (j, _) in enumerate(missing)])
        self.routes = [after or self._routes(a) for after, a in zip(routes, self._answers(), strict=True)]
        # Where a worker's processor sums up otherwise, an image between two tasks may go to the other one.
        left = [piece for j, after in enumerate(self.routes) for piece in self._missing(j, after)]
        more = dict(workers([partial(EvaluationWorker.more_rows, task=j, wanted=wanted) for j, wanted in left]))
        self._add([(j, more[n]) for n, (j, _) in enumerate(left)])

    def _batches(self, j: int) -> Iterator[Sequence[int]]:
        """The canonical batches of a test set, a few at a time."""
        size = self.plan.config.evaluate.batch_size
        num_batches = -(-self.plan.tasks[j].index.split(self.split).num_samples // size)
        if not num_batches:
            raise self._nothing_readable(j)
        for first in range(0, num_batches, BATCHES_PER_PIECE):
            yield range(first, min(first + BATCHES_PER_PIECE, num_batches))

    def _routes(self, answers: Answers) -> RoutesAfter:
        sizes = answers.batch_sizes(self.plan.config.evaluate.batch_size)
        return self.router.routes(torch.from_numpy(answers.frozen), sizes)

    def _missing(self, j: int, routes: RoutesAfter) -> Iterator[tuple[int, dict[int, Wanted]]]:
        """Pieces of the rows of test set j that need its images, about a batch of images each."""
        answers, missing = self._answers_of(j), dict[int, Wanted]()
        for task, wanted in answers.needed(routes, self.asked).items():
            rows = answers.rows.get(task)
            if rows is not None:
                absent = np.flatnonzero(rows.find(wanted) < 0)
                wanted = wanted.take(absent)
                at = rows.find(wanted, whatever_text=True)
                if (at >= 0).any():  # with class features at another weight: the image's own feature is the same
                    again = Rows(wanted.take(np.flatnonzero(at >= 0)), rows.feature[at[at >= 0]])
                    answers.rows[task] = Rows.joined([rows, again])
                wanted = wanted.take(np.flatnonzero(at < 0))
            if len(wanted.sample):
                missing[task] = wanted
        samples = np.unique(np.concatenate([w.sample for w in missing.values()])) if missing else np.zeros(0)
        for first in range(0, len(samples), self.plan.config.evaluate.batch_size):
            chosen = samples[first : first + self.plan.config.evaluate.batch_size]
            inside = {t: w.take(np.flatnonzero(np.isin(w.sample, chosen))) for t, w in missing.items()}
            yield j, {t: w for t, w in inside.items() if len(w.sample)}

    def _add(self, found: Sequence[tuple[int, dict[int, Rows]]]) -> None:
        for j in dict.fromkeys(j for j, _ in found):
            rows = self._answers_of(j).rows
            for task in {t for k, new in found if k == j for t in new}:
                before = [rows[task]] if task in rows else []
                rows[task] = Rows.joined(before + [new[task] for k, new in found if k == j and task in new])

    def _joined(self, j: int, parts: Sequence[Answers]) -> Answers:
        """Batches of one test set, in their order."""
        skipped: dict[str, int] = {}
        for p in parts:
            for reason, count in p.skipped.items():
                skipped[reason] = skipped.get(reason, 0) + count
        task, budget = self.plan.tasks[j], skip_budget(self.plan.config, self.plan.tasks[j], self.split)
        if sum(skipped.values()) > budget:
            raise DataError(
                f"task {task.name!r}: {sum(skipped.values())} samples of its {self.split} split could not be used and "
                f"the budget is {budget}. By reason: {skipped}. Prepare the data set again, or raise the budget"
            )
        rows = {t: Rows.joined([p.rows[t] for p in parts if t in p.rows]) for t in {t for p in parts for t in p.rows}}
        sample, labels = (np.concatenate([vars(p)[name] for p in parts]) for name in ("sample", "labels"))
        if not len(labels):
            raise self._nothing_readable(j)
        return Answers(tuple(key for p in parts for key in p.keys), sample, labels, skipped, rows)

    def _nothing_readable(self, j: int) -> DataError:
        return DataError(f"task {self.plan.tasks[j].name!r}: its {self.split} split has no readable image.")

    def _answers_of(self, j: int) -> Answers:
        known = self.known[j]
        assert known is not None
        return known

    def _score(self, workers: Workers, on_progress: OnProgress) -> float:
        """Scores what is used and not scored yet; returns the largest error of the class features that were used."""
        used = [self._used(j) for j in range(len(self.known))]
        pieces: dict[int, list[tuple[int, ToScore]]] = {}
        for j, rows_of in enumerate(used):
            for task, rows in rows_of.items():
                if task == NO_TASK or not self.by_set:  # else the answers need its features, not its scores
                    pieces.setdefault(task, []).extend((j, piece) for piece in self._unscored(j, task, rows))
        by_module = [(task, found) for task, found in pieces.items() if found]
        work: list[Work] = [
            partial(EvaluationWorker.score, module=t, pieces=[p for _, p in found], errors=self._errors(t))
            for t, found in by_module
        ]
        for number, scored in counted(workers(work), [1] * len(work), SCORES, on_progress):
            task, found = by_module[number]
            for (j, piece), scores in zip(found, scored, strict=True):
                self._set_scores(j, task, piece, scores)
        if self.by_set:
            self._answer_by_set(workers, on_progress)
        for j, rows_of in enumerate(used):
            known = self._answers_of(j).rows
            for task, at in rows_of.items():
                if len(kept := known[task].without_other_weights(at)) < len(known[task]):
                    known[task] = kept
        return max((error for t in pieces for error in self._errors(t).values()), default=0.0)

    def _used(self, j: int) -> dict[int, np.ndarray]:
        """Returns by module the rows of test set j that answers are read from."""
        answers = self._answers_of(j)
        needed = answers.needed(self.routes[j], self.asked)
        return {NO_TASK: np.arange(len(answers.labels))} | {t: answers.rows[t].find(w) for t, w in needed.items()}

    def _data_sets(self, j: int) -> list[int]:
        """Returns the data sets whose classes images of test set j are ever answered with."""
        space, num_tasks = self.plan.config.evaluate.label_space, len(self.known)
        asked = self.asked if space == "seen" else self.asked[:1]  # elsewhere what is learnt does not matter
        return sorted({c for learnt in asked for c in candidate_tasks(space, j, learnt, num_tasks)})

    def _unscored(self, j: int, task: int, used: np.ndarray) -> list[ToScore]:
        """The used rows that lack scores, data sets that lack them for the same rows together."""
        rows, found = self._answers_of(j).rows[task], dict[bytes, tuple[np.ndarray, list[int]]]()
        for c in self._data_sets(j):
            scores = rows.scores.get(self.key_of(task, c))
            lacking = used if scores is None else used[np.isnan(scores.best_logit[used])]
            if len(lacking):
                found.setdefault(lacking.tobytes(), (lacking, []))[1].append(c)
        return [
            ToScore(at, rows.feature[at], rows.wanted.text_weight[at], tuple(data_sets))
            for at, data_sets in found.values()
        ]

    def _errors(self, task: int) -> dict[int, float]:
        """Returns by data set the error of the class features under a task's module, where it is known."""
        errors: dict[int, float] = {}
        for j in range(len(self.known)):
            if (rows := self._answers_of(j).rows.get(task)) is None:
                continue
            for c in self._data_sets(j):
                if (scores := rows.scores.get(self.key_of(task, c))) is not None:
                    errors[c] = max(scores.error, errors.get(c, 0.0))
        return errors

    def _set_scores(self, j: int, task: int, piece: ToScore, found: Sequence[BestClasses]) -> None:
        rows = self._answers_of(j).rows[task]
        scores = dict(rows.scores)
        for c, new in zip(piece.data_sets, found, strict=True):
            key = self.key_of(task, c)
            scores[key] = (scores.get(key) or BestClasses.unknown(len(rows))).with_rows(piece.rows, new)
        self._answers_of(j).rows[task] = Rows(rows.wanted, rows.feature, scores)

    def _answer_by_set(self, workers: Workers, on_progress: OnProgress) -> None:
        """The answers after each set of tasks, where they depend on the whole set, from features alone."""
        sets = list(dict.fromkeys(frozenset(learnt) for learnt in self.asked if learnt))
        work: list[Work] = [
            partial(
                EvaluationWorker.answer_by_set,
                learnt=sorted(learnt),
                test_sets=[self._to_answer(j, sorted(learnt)) for j in range(len(self.known))],
            )
            for learnt in sets
        ]
        for number, found in counted(workers(work), [1] * len(work), TOGETHER, on_progress):
            for a, scores in zip(self._answers(), found, strict=True):
                a.joint[sets[number]] = scores

    def _to_answer(self, j: int, learnt: Sequence[int]) -> ToAnswer:
        answers, routes = self._answers_of(j), self.routes[j](learnt)
        features = answers.frozen.copy()
        for task in np.unique(routes.module[routes.module != NO_TASK]).tolist():
            images = np.flatnonzero(routes.module == task)
            rows = answers.rows[task]
            features[images] = rows.feature[rows.find(answers.wanted(routes, images))]
        return ToAnswer(answers.frozen, features, routes.task, routes.weight, routes.text_weight)
