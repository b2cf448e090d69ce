"""This runs in those processes of a batch prediction that answer images, which others have read (batch_reader.py)."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import torch

from diki_ray.answering.class_features import Candidates, Exact, Tabulated
from diki_ray.config import Config
from diki_ray.config.places import with_absolute_paths
from diki_ray.data.images import UndecodableImageError
from diki_ray.errors import ConfigError
from diki_ray.learning.module import TaskModule
from diki_ray.prediction.batch_reader import READ, decoded
from diki_ray.prediction.run_predictor import (
    RunPredictor,
    Squares,
    load_predictor,
    on_this_machine,
    predictor_over,
)
from diki_ray.runs.plan import build_method, device_of, load_backbone, precision_of
from diki_ray.runs.stored_run import config_of, noted_text_error, open_learnt

IMAGES_PER_PASS = 64
CALLS_AT_ONCE = 2
TABLE_BYTES = 2 * 2**30
"""A worker keeps so many bytes of class features."""
MEASURED_CLASSES = 32
"""At most about so many are measured, as each costs 65 text passes a task."""

ANSWERED = pa.schema(
    {
        "image": pa.string(),
        "class_name": pa.string(),
        "confidence": pa.float64(),
        "task": pa.string(),
        "weight": pa.float64(),
        "log_densities": pa.map_(pa.string(), pa.float64()),
        "error": pa.string(),
    }
)
"""Every input has one row. With an `error` the answer's columns are null."""
COMPUTED_S = pa.field("computed_s", pa.float64())
"""A worker adds this column: the seconds that it computed for a row. The driver counts them, and writes the others."""


@dataclass(frozen=True)
class Learnt:
    """Holds all of a run that other processes need to answer with it, without its storage."""

    config: Config
    backbone_digest: str
    modules: tuple[bytes, ...]
    classes: tuple[str, ...] | None
    """Answers are chosen among these, with the template; None: among all that were learnt."""
    template: str
    squares: Squares | None = None
    """None: the backbone's preprocessing needs whole images."""
    text_error: float | None = None
    """The largest error of an interpolated class feature, as the run's evaluation found it; None: it did not."""

    @classmethod
    def of(cls, storage: str, run: str, config: Config | None, classes: Sequence[str] | None, template: str) -> Learnt:
        """Reads a run. Raises ConfigError for one that cannot answer, or classes that cannot be asked for."""
        checked = load_predictor(storage, run, config)  # here first, before any cluster
        if classes is not None:
            checked.among(classes, template)
        store = open_learnt(storage, run)
        known = config_of(store, config)
        return cls(
            with_absolute_paths(known),
            checked.predictor.backbone.digest(),
            tuple(module.to_bytes() for module in checked.predictor.modules),
            None if classes is None else tuple(classes),
            template,
            Squares.of(checked.predictor.backbone.preprocess),
            noted_text_error(store, known.evaluate.text_grid) if classes is None else None,
        )

    def predictor(self) -> RunPredictor:
        """Builds the predictor on this process's device. Raises ConfigError where this machine's backbone has other
        weights."""
        config = on_this_machine(self.config)
        backbone = load_backbone(config)
        if backbone.digest() != self.backbone_digest:
            raise ConfigError(f"the backbone {backbone.name!r} has other weights on a worker's machine than here.")
        backbone.to(device_of(config), precision_of(config))
        modules = [TaskModule.from_bytes(blob) for blob in self.modules]
        method = build_method(config, backbone)
        grid = config.evaluate.text_grid
        found = predictor_over(config, method, modules, Tabulated(grid, TABLE_BYTES) if grid else Exact(TABLE_BYTES))
        return found if self.classes is None else found.among(self.classes, self.template)


class Worker:
    """A Ray Data actor that takes what `read_parts` gives and returns answers, one row for each. CALLS_AT_ONCE may call
    it at the same time: while the images of one call are answered, those of the next are preprocessed."""

    def __init__(self, learnt: Any) -> None:
        run: Learnt = ray.get(learnt)
        self._predictor, self._squares = run.predictor(), run.squares
        self._threads = ThreadPoolExecutor(run.config.data.num_threads)
        self._answering = threading.Lock()  # the backbone holds the residual in use
        gc.freeze()  # else a full collection looks through all that torch has: 0.2 s

    def __call__(self, rows: pa.Table) -> pa.Table:
        names, data, refused = (rows[column].to_pylist() for column in READ.names)
        pixels, errors = self._preprocessed(data, refused)
        with self._answering:
            started = time.monotonic()
            answers = iter(self._predictor.answer_pixels(pixels) if len(pixels) else ())
            computed_s = (time.monotonic() - started) / max(1, len(names))
        answered = [
            {"image": name} | ({"error": error} if error else vars(next(answers)))
            for name, error in zip(names, errors, strict=True)
        ]
        seconds = pa.array([computed_s] * len(names), COMPUTED_S.type)
        return pa.Table.from_pylist(answered, ANSWERED).append_column(COMPUTED_S, seconds)

    def _preprocessed(
        self, data: Sequence[bytes | None], refused: Sequence[str | None]
    ) -> tuple[torch.Tensor, list[str | None]]:
        """Returns the B images that can be used, [B, 3, H, W], and for each of all images why it cannot; None: it
        can."""
        if self._squares is not None:
            device = self._predictor.predictor.backbone.device
            errors = [
                None if some is not None else said or "not read" for some, said in zip(data, refused, strict=True)
            ]
            return self._squares.pixels([some for some in data if some is not None], device), errors
        found = list(self._threads.map(self._pixels, data, refused))
        ready = [pixels for pixels in found if not isinstance(pixels, str)]
        return torch.stack(ready) if ready else torch.empty(0), [p if isinstance(p, str) else None for p in found]

    def _pixels(self, data: bytes | None, refused: str | None) -> torch.Tensor | str:
        """Returns [3, H, W] of an image file, or why there is none."""
        if data is None:
            return refused or "not read"
        try:
            return self._predictor.predictor.backbone.preprocess(decoded(data))
        except UndecodableImageError as error:
            return error.reason


def interpolation_error(learnt: Learnt, tasks: Sequence[str]) -> float:
    """Returns the largest absolute error of an interpolated class feature (norm 1), over some of the classes, under
    these tasks."""
    answering = learnt.predictor()
    step = max(1, sum(len(c.names) for c in answering.candidates) // MEASURED_CLASSES)
    some: dict[int, list[Candidates]] = {}
    for c in answering.candidates:
        some.setdefault(c.tokens.shape[1], []).append(c)  # those of as many templates are encoded together
    together = [
        Candidates(
            tuple(name for c in alike for name in c.names[::step]),
            torch.cat([c.tokens[::step] for c in alike]),
            f"every {step} of {[c.key for c in alike]}",
        )
        for alike in some.values()
    ]
    numbers = [answering.tasks.index(task) for task in tasks]
    return max(answering.predictor.interpolation_error(t, candidates) for t in numbers for candidates in together)
