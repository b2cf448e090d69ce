"""A run's model, loaded in this process: its snapshots, the one thread that answers, and the metrics of both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from diki_ray.answering.class_features import Candidates
from diki_ray.errors import CorruptError
from diki_ray.prediction.run_predictor import Squares
from diki_ray.serving.batches import Batches
from diki_ray.serving.engine import Question, answer_questions
from diki_ray.serving.metrics import SECONDS
from diki_ray.serving.schema import DEFAULT_TEMPLATE, Answered, Asked, TaskInfo, TasksResponse
from diki_ray.serving.settings import Settings
from diki_ray.serving.snapshot import Snapshot, Snapshots
from diki_ray.serving.uploads import Refusal


@dataclass(frozen=True, eq=False)
class _Image:
    data: bytes
    snapshot: Snapshot
    candidates: tuple[Candidates, ...]
    deadline: float


class LoadedModel:
    """Answers decoded images with what a run has learnt.

    size_px: the side of the squares that it takes; None: its backbone scales images in a way of its own, so that each
    has to be `preprocessed`.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.snapshots = Snapshots(settings)
        self.metrics = ModelMetrics(self.snapshots)
        self._squares = Squares.of(self.snapshots.backbone.preprocess)
        self.size_px = None if self._squares is None else self._squares.size_px
        self._shape = torch.Size()  # of what the backbone's own preprocessing makes
        self._num_inside = 0
        self._batches = Batches(
            self._answer_together, settings.max_batch_size, settings.batch_wait_s, lambda: self._num_inside
        )

    def ask(
        self, images: Sequence[bytes], asked: Asked, deadline: float, num_inside: int
    ) -> list[Future[Answered | None]]:
        """Returns the answers that will be, all under the snapshot that is current now; None: the deadline came first.

        images: of each the RGB bytes of a square of `size_px`, or what `preprocessed` returned. num_inside: how many
        images there are on their way or waiting, with these.

        Raises:
            Refusal: there is nothing to choose among.
        """
        snapshot = self.snapshots.current
        candidates: tuple[Candidates, ...]
        if asked.classes is not None:
            candidates = (self.snapshots.vocabularies.named(asked.classes, asked.template or DEFAULT_TEMPLATE),)
        elif snapshot.learnt:
            candidates = snapshot.learnt
        else:
            raise Refusal(422, "the run has no task at present: give the classes to choose from.", "no classes")
        self._num_inside = num_inside
        return [self._batches.ask(_Image(data, snapshot, candidates, deadline)) for data in images]

    def preprocessed(self, rgb: bytes, width: int, height: int) -> bytes:
        """Returns what the backbone makes of an image that is no square of `size_px`."""
        pixels = self.snapshots.backbone.preprocess(Image.frombytes("RGB", (width, height), rgb)).float()
        self._shape = pixels.shape
        return pixels.numpy().tobytes()

    def tasks(self) -> TasksResponse:
        snapshot = self.snapshots.current
        infos = [
            TaskInfo(name=m.task, class_names=list(m.class_names), templates=list(m.templates), digest=digest)
            for m, digest in zip(snapshot.predictor.modules, snapshot.digests, strict=True)
        ]
        return TasksResponse(
            run=self._settings.run,
            version=snapshot.version,
            tasks=infos,
            text_grid=self._settings.text_grid,
            text_feature_error=self.snapshots.text_feature_error,
            stale_since=self.snapshots.stale_since,
        )

    def exposed(self) -> str:
        """Returns the model's metrics in Prometheus' text format."""
        return self.metrics.exposed()

    def close(self) -> None:
        self.snapshots.close()
        self._batches.close()

    def _answer_together(self, images: list[_Image]) -> list[Answered | None]:
        """Answers these images in one pass."""
        started = time.monotonic()
        pixels = self._pixels([image.data for image in images])
        questions = [Question(p, i.snapshot, i.candidates, i.deadline) for p, i in zip(pixels, images, strict=True)]
        try:
            answers = answer_questions(questions)
        except CorruptError as error:
            raise Refusal(500, str(error), "not finite") from error
        self.metrics.batch_images.observe(len(questions))
        self.metrics.batch_seconds.observe(time.monotonic() - started)
        return [
            None if a is None else Answered(i.snapshot.version, a.task, a.model_dump_json().encode())
            for a, i in zip(answers, images, strict=True)
        ]

    def _pixels(self, images: Sequence[bytes]) -> list[torch.Tensor]:
        """Returns [3, H, W] of each image: squares are bytes, and everything else is float32 already, of which as many
        pixels would take four times as much."""
        size = 0 if self.size_px is None else 3 * self.size_px**2
        squares = [data for data in images if len(data) == size]
        device = self.snapshots.backbone.device
        converted = iter(self._squares.pixels(squares, device) if self._squares else ())
        return [
            next(converted)
            if len(data) == size
            else torch.frombuffer(bytearray(data), dtype=torch.float32).view(self._shape).to(device)
            for data in images
        ]


class ModelMetrics:
    """Counts passes, and tells what is served, in a registry of its own."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        self._registry = registry = CollectorRegistry()
        self.batch_images = Histogram(
            "diki_serve_batch_images",
            "Images that shared a pass.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "diki_serve_batch_duration_seconds", "Seconds of a pass.", buckets=SECONDS, registry=registry
        )

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"diki_serve_{name}", what, labels, registry=registry)

        self._version = gauge("version", "Entry of the run's log up to which modules are served.")
        self._tasks = gauge("tasks", "Tasks that are served.")
        self._stale = gauge("stale", "1 while the run's storage cannot be read and its last known modules answer.")
        self._bytes = gauge("class_features_bytes", "Class features kept, of learnt and of named classes.", "classes")
        self._failures = Counter(
            "diki_serve_refresh_failures_total", "Looks at the run's storage that failed.", registry=registry
        )
        self._counted_failures = 0

    def exposed(self) -> str:
        snapshots = self._snapshots
        self._version.set(snapshots.current.version)
        self._tasks.set(len(snapshots.current.tasks))
        self._stale.set(snapshots.stale_since is not None)
        self._failures.inc(snapshots.failures - self._counted_failures)
        self._counted_failures = snapshots.failures
        self._bytes.labels("learnt").set(snapshots.class_features.kept.num_bytes)
        self._bytes.labels("named").set(snapshots.class_features.passing.num_bytes)
        return generate_latest(self._registry).decode()
