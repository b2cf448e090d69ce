"""Prometheus metrics of a run, served over HTTP while it goes on. Ray's own are Ray's; these are what only we know.

Names by Prometheus' conventions: base units (seconds, bytes, ratios from 0 to 1), `_total` for counters, `_info` for
constants. A task's label is its name. Two families have a series for every pair of tasks (accuracy after each stage,
routing); beyond MAX_PAIRED_TASKS only their last stage and their diagonal are kept, or a stream of a thousand tasks
would have a million series. Beyond MAX_TASKS not every task has series: of training those that were trained last, of
results those of the lowest accuracy; means are of all.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Info, start_http_server

from diki_ray.config import Config
from diki_ray.errors import ConfigError, StorageError
from diki_ray.runs.progress import BATCHES
from diki_ray.store.interface import HeldRun

MAX_PAIRED_TASKS = 32
MAX_TASKS = 512
"""A task has about 20 series; a scrape of so many tasks takes a megabyte."""
STORE_EVERY_S = 5.0
PHASES = ("plan", "cluster", "train", "evaluate", "done", "failed")
UNNAMED = "unreadable"
"""The reason of skipped training images: a module keeps only their number."""


class Telemetry:
    """A run's metrics in a registry of their own; a Listener of its progress. Nothing is served until `exporting`."""

    def __init__(self, config: Config, protocol: str) -> None:
        self.registry = registry = CollectorRegistry()
        self._seen: dict[tuple[Any, ...], float] = {}
        self._trained: dict[str, None] = {}
        self._store: HeldRun | None = None
        self._keys: Collection[str] = ()
        self._store_asked = 0.0

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"diki_{name}", what, labels, registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"diki_{name}", what, labels, registry=registry)

        Info("diki_build", "Versions of what this run is made with.", registry=registry).info(
            {name: version(name) for name in ("torch", "ray")}
            | {"version": version("diki-ray"), "python": platform.python_version()}
        )
        Info("diki_run", "Which run this is.", registry=registry).info(
            {"run": config.run.name, "protocol": protocol, "config_digest": config.digest()}
        )
        self.phase = Enum("diki_phase", "What the run is doing.", states=PHASES, registry=registry)
        self.up = gauge("up", "1 while the run goes on, 0 once it has ended and only its last values are shown.")
        self.last_progress = gauge("last_progress_timestamp_seconds", "When a worker was last heard of, since 1970.")

        self.loss = gauge("train_loss", "Mean training loss of the epoch so far.", "task")
        self.accuracy = gauge("train_accuracy_ratio", "Training accuracy of the epoch so far.", "task")
        self.validation = gauge("validation_accuracy_ratio", "Validation accuracy after the last epoch.", "task")
        self.throughput = gauge("train_images_per_second", "Images a second in this epoch, over all workers.", "task")
        self.progress = gauge("train_progress_ratio", "Share of a task's training steps that are done.", "task")
        self.epochs = counter("train_epochs_total", "Epochs finished by this process.", "task")
        self.nonfinite = counter("train_nonfinite_steps_total", "Steps left out: no finite loss or gradient.", "task")
        self.evaluated = gauge("evaluation_progress_ratio", "Share of the evaluation's batches that are done.")

        self.tasks = gauge("tasks", "Tasks of the stream.")
        self.tasks_learnt = gauge("tasks_learnt", "Tasks of the stream whose module is committed.")
        self.store_modules = gauge("store_modules", "Modules of the run in its store.")
        self.store_bytes = gauge("store_bytes", "Bytes of these modules.")
        self.store_written = gauge(
            "store_last_durable_write_timestamp_seconds", "When the run last wrote to its storage, since 1970."
        )
        self.corrupt_checkpoints = counter(
            "store_corrupt_checkpoints_total", "Damaged checkpoints that were passed over."
        )
        self.corrupt_modules = counter("store_corrupt_modules_total", "Damaged modules that were found.")

        self.matrix = gauge("accuracy_ratio", "Accuracy on a task's test set after `stage` tasks.", "task", "stage")
        self.zero_shot = gauge("zero_shot_accuracy_ratio", "Accuracy of the frozen model.", "task")
        self.chance = gauge("chance_accuracy_ratio", "What guessing gives.", "task")
        self.summary = gauge("stream_accuracy_ratio", "Means over tasks: transfer, last, forgetting, …", "metric")
        self.routed = gauge("routed_ratio", "Share of a test set that a task answered at the end.", "task", "routed_to")
        self.weight = gauge(
            "integration_weight_mean", "Mean integration weight of test images, learnt or not yet.", "task", "domain"
        )
        self.skipped = counter("skipped_samples_total", "Samples that could not be used.", "task", "split", "reason")
        self.duration = gauge("phase_duration_seconds", "Seconds of a finished phase.", "phase")
        self.up.set(1)
        self.last_progress.set_to_current_time()

    def watch(self, store: HeldRun, keys: Collection[str]) -> None:
        """From now on tell of the store too. keys: of the stream's modules."""
        self._store, self._keys = store, keys
        self.tasks.set(len(keys))
        self.store_written.set_function(lambda: store.last_durable_write)
        self.observe_store()

    def on_event(self, event: dict[str, Any]) -> None:
        """What a worker or the evaluator reports (`progress.Listener`)."""
        self.last_progress.set_to_current_time()
        if event["kind"] == "evaluated":
            if event["what"] == BATCHES:
                self.evaluated.set(event["done"] / max(event["total"], 1))
            return
        task = event["task"]
        self._make_room(task)
        self.loss.labels(task).set(event["loss"])
        self.accuracy.labels(task).set(event["accuracy"])
        self.throughput.labels(task).set(event["images_per_s"])
        self.progress.labels(task).set(event["step"] / max(event["num_steps"], 1))
        self._raise(self.nonfinite, event["num_nonfinite"], task)
        if event["kind"] == "epoch":
            self.epochs.labels(task).inc()
            if event.get("validation_accuracy") is not None:
                self.validation.labels(task).set(event["validation_accuracy"])
        if time.monotonic() - self._store_asked > STORE_EVERY_S:
            self.observe_store()

    def _make_room(self, task: str) -> None:
        """For the series of a task in training: those of the task that was heard of longest ago go."""
        self._trained.pop(task, None)
        self._trained[task] = None
        if len(self._trained) > MAX_TASKS:
            oldest = next(iter(self._trained))
            del self._trained[oldest]
            for family in (self.loss, self.accuracy, self.validation, self.throughput, self.progress, self.epochs):
                family.remove(oldest)
            self.nonfinite.remove(oldest)
            self._seen.pop((self.nonfinite, oldest), None)

    def observe_store(self) -> None:
        """Sizes and counts of the store as it is now; nothing while it does not answer."""
        self._store_asked = time.monotonic()
        if self._store is None:
            return
        try:
            status, entries = self._store.status(), self._store.modules()
        except StorageError:
            return  # the run itself meets this too, and waits or says so
        self.store_modules.set(status["num_modules"])
        self.store_bytes.set(status["num_bytes"])
        self._raise(self.corrupt_checkpoints, status["corrupt_checkpoints"])
        self._raise(self.corrupt_modules, status["corrupt_modules"])
        self.tasks_learnt.set(len({entry.key for entry in entries} & set(self._keys)))

    def on_results(self, results: Mapping[str, Any]) -> None:
        """The final values, from results.json."""
        self.last_progress.set_to_current_time()
        tasks = results["tasks"]
        names = [t["name"] for t in tasks]
        last = len(names) - 1
        worst = sorted(range(len(names)), key=lambda j: results["accuracy"][last][j] or 0.0)[:MAX_TASKS]
        for j, task in ((j, tasks[j]) for j in sorted(worst)):
            name = task["name"]
            self.zero_shot.labels(name).set(results["zero_shot"][j])
            self.chance.labels(name).set(task["chance"])
            for i in range(len(names)):
                if len(names) <= MAX_PAIRED_TASKS or i in (j, last):
                    self.matrix.labels(name, str(i + 1)).set(results["accuracy"][i][j])
            self._routing(task, names, j)
            for domain, histogram in task["weights"].items():
                if histogram is not None and histogram["mean"] is not None:
                    self.weight.labels(name, domain).set(histogram["mean"])
            self._raise(self.skipped, task["num_skipped_train"], name, "train", UNNAMED)
            for reason, count in task["skipped_test"].items():
                self._raise(self.skipped, count, name, "test", reason)
        for name, metric in results["metrics"].items():
            if metric["mean"] is not None:
                self.summary.labels(name).set(metric["mean"])
        for name, seconds in results["seconds"].items():
            self.duration.labels(name).set(seconds)
        self.observe_store()

    def _routing(self, task: Mapping[str, Any], names: list[str], own: int) -> None:
        counts = [*task["routed"]["tasks"], task["routed"]["frozen"]]
        total = sum(counts) or 1
        for k, (target, count) in enumerate(zip([*names, "frozen"], counts, strict=True)):
            if len(names) <= MAX_PAIRED_TASKS or k in (own, len(names)):
                self.routed.labels(task["name"], target).set(count / total)

    def _raise(self, counter: Counter, value: float, *labels: str) -> None:
        """Bring a counter up to a count that is kept elsewhere, which may begin again when its process does."""
        series = counter.labels(*labels) if labels else counter
        before = self._seen.get((counter, *labels), 0.0)
        series.inc(value - before if value >= before else value)
        self._seen[(counter, *labels)] = value


@contextmanager
def exporting(config: Config, protocol: str) -> Iterator[Telemetry]:
    """A run's telemetry; served on `telemetry.host:port` while in it, and `telemetry.linger_s` longer.

    Raises:
        ConfigError: the port is taken, or the host is not one of this machine's.
    """
    telemetry = Telemetry(config, protocol)
    settings = config.telemetry
    if settings.port is None:
        yield telemetry
        return
    try:
        server, thread = start_http_server(settings.port, settings.host, telemetry.registry)
    except OSError as error:
        raise ConfigError(
            f"telemetry.port={settings.port}: metrics cannot be served on {settings.host}:{settings.port} "
            f"({error.strerror or error}); choose a free port, or leave telemetry.port out."
        ) from error
    linger_s = settings.linger_s
    try:
        yield telemetry
        telemetry.phase.state("done")
    except BaseException as error:
        telemetry.phase.state("failed")
        linger_s = linger_s if isinstance(error, Exception) else 0.0  # who interrupts a job does not want to wait
        raise
    finally:
        telemetry.up.set(0)
        time.sleep(linger_s)
        server.shutdown()
        server.server_close()
        thread.join()
