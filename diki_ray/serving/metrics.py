"""A server has Prometheus metrics by the conventions of runs/telemetry.py. The number of labels is bounded: unknown
routes are `other`, and nothing that a request says becomes a label. cluster/grafana/diki.json shows every metric."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.metrics_core import Metric

from diki_ray.serving.schema import ImageAnswer
from diki_ray.serving.snapshot import Snapshots

FROZEN = "frozen"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Holds one replica's metrics, in a registry of their own."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        self.registry = registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"diki_serve_{name}", what, labels, registry=registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"diki_serve_{name}", what, labels, registry=registry)

        Info("diki_build", "Versions of what answers.", registry=registry).info(
            {name: version(name) for name in ("torch", "ray")} | {"version": version("diki-ray")}
        )
        Info("diki_serve_run", "Which run is served.", registry=registry).info({"run": snapshots.settings.run})
        self.requests = counter("requests_total", "Requests, by route and HTTP status.", "route", "status")
        self.seconds = Histogram(
            "diki_serve_request_duration_seconds",
            "From a request's first byte to its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.images = counter("images_total", "Images answered, by the task that answered.", "task")
        self.refused = counter("refused_requests_total", "Requests for answers that were refused, by reason.", "reason")
        self.batch_images = Histogram(
            "diki_serve_batch_images",
            "Images that shared a pass.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "diki_serve_batch_duration_seconds", "Seconds of a pass.", buckets=_SECONDS, registry=registry
        )
        self.waiting = gauge("waiting_images", "Images that wait for their pass or are in it.")
        self._version = gauge("version", "Entry of the run's log up to which modules are served.")
        self._tasks = gauge("tasks", "Tasks that are served.")
        self._stale = gauge("stale", "1 while the run's storage cannot be read and its last known modules answer.")
        self._failures = counter("refresh_failures_total", "Looks at the run's storage that failed.")
        self._bytes = gauge("class_features_bytes", "Class features kept, of learnt and of named classes.", "classes")
        self._counted_failures = 0

    def answered(self, answer: ImageAnswer) -> None:
        self.images.labels(answer.task or FROZEN).inc()

    def collected(self) -> list[Metric]:
        """Returns all metrics as they are now."""
        snapshots = self._snapshots
        self._version.set(snapshots.current.version)
        self._tasks.set(len(snapshots.current.tasks))
        self._stale.set(snapshots.stale_since is not None)
        self._failures.inc(snapshots.failures - self._counted_failures)
        self._counted_failures = snapshots.failures
        self._bytes.labels("learnt").set(snapshots.class_features.kept.num_bytes)
        self._bytes.labels("named").set(snapshots.class_features.passing.num_bytes)
        return list(self.registry.collect())


def exposition(replicas: dict[str, list[Metric]]) -> bytes:
    """Returns the metrics of several replicas in Prometheus' text format, with their names as the label `replica`."""

    class Together:
        def collect(self) -> Iterator[Metric]:
            yield from together(replicas)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Together())
    return generate_latest(registry)


def together(replicas: dict[str, list[Metric]]) -> Iterable[Metric]:
    """Merges the metrics of several replicas; each sample gets its replica's name as the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, metrics in sorted(replicas.items()):
        for metric in metrics:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples.extend(s._replace(labels={**s.labels, "replica": replica}) for s in metric.samples)
    return families.values()
