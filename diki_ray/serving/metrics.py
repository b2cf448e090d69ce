"""A server has Prometheus metrics by the conventions of runs/telemetry.py. The number of labels is bounded: unknown
routes are `other`, and nothing that a request says becomes a label. cluster/grafana/diki.json shows every metric.

Those of requests are here; those of the model are with it (loaded_model.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.metrics_core import Metric

FROZEN = "frozen"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Holds what is counted of one replica's requests, in a registry of their own."""

    def __init__(self, run: str) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"diki_serve_{name}", what, labels, registry=registry)

        Info("diki_build", "Versions of what answers.", registry=registry).info(
            {name: version(name) for name in ("torch", "ray")} | {"version": version("diki-ray")}
        )
        Info("diki_serve_run", "Which run is served.", registry=registry).info({"run": run})
        self.requests = counter("requests_total", "Requests, by route and HTTP status.", "route", "status")
        self.seconds = Histogram(
            "diki_serve_request_duration_seconds",
            "From a request's first byte to its answer.",
            ("route",),
            buckets=SECONDS,
            registry=registry,
        )
        self.images = counter("images_total", "Images answered, by the task that answered.", "task")
        self.refused = counter("refused_requests_total", "Requests for answers that were refused, by reason.", "reason")
        self.waiting = Gauge(
            "diki_serve_waiting_images", "Images that wait for their pass or are in it.", registry=registry
        )

    def answered(self, task: str | None) -> None:
        self.images.labels(task or FROZEN).inc()


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
