"""What evaluations have computed, kept in the storage by what it depends on: a file for the frozen model and for each
module on a test set. Everything in it can be computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from diki_ray.answering.answers import Answers
from diki_ray.answering.routing import NO_TASK
from diki_ray.answering.rows import BestClasses, Rows, Wanted
from diki_ray.learning.methods import METHODS
from diki_ray.learning.module import read_tensors, write_tensors
from diki_ray.runs.plan import Plan, precision_of


class CacheStore(Protocol):
    """Where derived arrays are kept: the storage's `Cache`, or nowhere."""

    def names(self) -> frozenset[str]: ...

    def get(self, name: str) -> bytes | None: ...

    def put(self, name: str, data: bytes) -> None: ...


class NoCache:
    """Neither reads nor keeps."""

    def names(self) -> frozenset[str]:
        return frozenset()

    def get(self, name: str) -> bytes | None:
        return None

    def put(self, name: str, data: bytes) -> None:
        return None


class AnswerCache:
    """What is known of one test set of a plan's stream."""

    def __init__(self, plan: Plan, store: CacheStore, task: int, digests: Sequence[str], split: str):
        data = {
            "backbone": plan.backbone_digest,
            "precision": str(precision_of(plan.config)),
            "data": plan.tasks[task].index.digest(split),
            "split": split,
            "batch_size": plan.config.evaluate.batch_size,
        }
        self._store, modules = store, {NO_TASK: "frozen"} | dict(enumerate(digests))
        self._names = {t: f"rows-{_digest(data | {'module': m})}.safetensors" for t, m in modules.items()}
        self._stored: dict[int, Rows] = {}

    @property
    def is_known(self) -> bool:
        """Whether the test set was read before: what is new of it is then computed for the images that need it."""
        return self._store.get(self._names[NO_TASK]) is not None

    def load(self, kept: Container[str]) -> Answers | None:
        """None where not even the frozen features are known.

        kept: the cache's `names`. Of a thousand tasks each would else be asked for on each of a thousand test sets.
        """
        blob = self._store.get(self._names[NO_TASK])
        if blob is None:
            return None
        header, arrays = read_tensors(blob)
        rows = {NO_TASK: _rows(header, arrays)}
        for task in (t for t in self._names if t != NO_TASK):
            if self._names[task] in kept and (blob := self._store.get(self._names[task])) is not None:
                rows[task] = _rows(*read_tensors(blob))
        self._stored = dict(rows)
        sample = rows[NO_TASK].wanted.sample
        return Answers(tuple(header["keys"]), sample, arrays["labels"], header["skipped"], rows)

    def save(self, answers: Answers) -> None:
        """Keeps what is new."""
        for task, rows in answers.rows.items():
            if rows is self._stored.get(task):
                continue
            header: dict[str, Any] = {"errors": {key: scores.error for key, scores in rows.scores.items()}}
            arrays = {**rows.wanted._asdict(), "feature": rows.feature}
            for key, scores in rows.scores.items():
                arrays |= {f"{key}/{name}": vars(scores)[name] for name in BestClasses.ARRAYS}
            if task == NO_TASK:
                header |= {"keys": answers.keys, "skipped": answers.skipped}
                arrays["labels"] = answers.labels
            arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            self._store.put(self._names[task], write_tensors(header, arrays))


def score_keys(plan: Plan) -> Callable[[int, int], str]:
    """The key of the scores of a task's module (NO_TASK: the frozen model's) among the classes of a task's data set."""
    e = plan.config.evaluate
    tabulated = e.routing == "image" and METHODS[plan.config.method.name].answering == "routed"
    names = [_digest({"names": t.class_names, "templates": t.templates}) for t in plan.tasks]

    def key_of(task: int, data_set: int) -> str:
        grid = e.text_grid if tabulated and task != NO_TASK else 0
        return f"{names[data_set]}-{grid}"

    return key_of


def _rows(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Rows:
    scores = {
        key: BestClasses(**{name: arrays[f"{key}/{name}"] for name in BestClasses.ARRAYS}, error=error)
        for key, error in header["errors"].items()
    }
    return Rows(Wanted(*(arrays[name] for name in Wanted._fields)), arrays["feature"], scores)


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=asdict).encode()).hexdigest()[:32]
