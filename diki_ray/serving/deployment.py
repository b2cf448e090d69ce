"""The service is a Ray Serve application: replicas of one deployment hold the run's modules and batch what comes.

`application` is what a RayService's `import_path` names; `diki-ray serve` runs it on this machine or a joined cluster.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import ray
from prometheus_client.metrics_core import Metric
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from diki_ray.serving.app import Service, build_app
from diki_ray.serving.doors import Door
from diki_ray.serving.model_process import ModelProcess
from diki_ray.serving.settings import Settings, parse_settings, token_digest

METRICS_TIMEOUT_S = 5.0


@serve.deployment(name="Answering")
@serve.ingress()
class Answering:
    """One replica answers what Ray Serve sends it. It ends with its model's process, and Ray Serve starts another."""

    def __init__(self, settings: Settings) -> None:
        self._service = Service(settings, ModelProcess(settings, on_end=partial(os._exit, 1)))
        # As many as Ray Serve lets work and wait (`deploy`).
        self._door = Door(build_app(self._service), 2 * settings.max_requests)
        gc.freeze()  # else each full collection looks through everything imported, a twelfth of this process's time

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return build_app(self._service, self._metrics_of_all)

    async def _metrics_of_all(self) -> Mapping[str, list[Metric]]:
        """A scrape reaches one replica, whichever; it answers for all, or counters would jump between them."""
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        replies = await handle.broadcast("metrics").results_async(timeout_s=METRICS_TIMEOUT_S)
        return dict(replies)

    async def door(self) -> tuple[str, int]:
        """Returns the node that this replica is on, and the port of its door there."""
        return ray.get_runtime_context().get_node_id(), self._door.port

    async def metrics(self) -> tuple[str, list[Metric]]:
        return serve.get_replica_context().replica_tag, await self._service.collected()


def deploy(settings: Settings, **options: Any) -> Application:
    """Returns the application of these settings; options are those of Ray Serve's deployment (num_replicas, …)."""
    limits = {"max_ongoing_requests": settings.max_requests, "max_queued_requests": settings.max_requests}
    deployment: Any = Answering
    return deployment.options(**limits, **options).bind(settings)


def application(arguments: dict[str, Any]) -> Application:
    """Returns the application that a RayService names: the fields of Settings, with the token from `token_file` or the
    pods' environment.

    Raises:
        ConfigError: a field that is wrong, or neither a token nor `no_token: true`.
    """
    fields = {name: value for name, value in arguments.items() if name not in ("no_token", "token_file")}
    digest = token_digest(arguments.get("token_file"), arguments.get("no_token") is True)
    return deploy(parse_settings(**fields, token_sha256=digest))
