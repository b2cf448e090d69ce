"""A server joins or starts a cluster, deploys the application, says its URL, and ends in order."""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from diki_ray.clip.trust import named_backbone
from diki_ray.config.places import with_absolute_paths
from diki_ray.errors import ConfigError
from diki_ray.runs.cluster import connected
from diki_ray.runs.local_cluster import LOOPBACK
from diki_ray.runs.stored_run import config_of, open_learnt
from diki_ray.serving.deployment import deploy
from diki_ray.serving.doors import Doors
from diki_ray.serving.front import front, listen
from diki_ray.serving.settings import Settings

APP_NAME = "diki"
_PROXY_START_S = 30.0
_DOORS_EVERY_S = 5.0
_DOORS_TIMEOUT_S = 5.0
_PROXY_GRACE_S = 5.0
"""The proxy's own limit comes so much later than the application's, which can say why."""


@contextmanager
def serving(
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int = 1,
    cpus_per_replica: float = 1.0,
    gpus_per_replica: float = 0.0,
    address: str | None = None,
) -> Iterator[str]:
    """Yields the URL of a server that answers while in it.

    It runs on the cluster at `address` or in RAY_ADDRESS, else on one of this machine's, started and stopped here. In a
    process that is connected already, that connection is used and kept.

    Raises:
        ConfigError: no such run, a port that is taken, a cluster that cannot be joined, replicas that do not start.
    """
    settings = settings.model_copy(update={"storage": absolute(settings.storage)})
    told = named_backbone(settings.backbone, settings.pretrained, settings.directory)
    config = config_of(open_learnt(settings.storage, settings.run), backbone=told)
    if told is not None:  # replicas run in folders of their own
        located = with_absolute_paths(config).backbone
        names = {"backbone": located.name, "pretrained": located.pretrained, "directory": located.directory}
        settings = settings.model_copy(update=names)
    with listen(host, port) as listener, connected(address, setting="address"):
        # HTTP options are a cluster's: another application's server, with its host and port, would be used silently.
        if serve.status().applications:
            raise ConfigError("this cluster serves something already: end that first, or leave the address out.")
        options = HTTPOptions(
            host=LOOPBACK, port=_free_port(), request_timeout_s=settings.request_timeout_s + _PROXY_GRACE_S
        )
        serve.start(http_options=options)
        try:
            _run(settings, replicas, {"num_cpus": cpus_per_replica, "num_gpus": gpus_per_replica})
            upstream = f"http://{LOOPBACK}:{options.port}"
            _wait_for_proxy(upstream)
            shown = f"[{host}]" if ":" in host else host
            doors = Doors()
            gc.freeze()  # else each full collection looks through everything imported
            with _following(doors), front(listener, upstream, settings, doors):
                yield f"http://{shown}:{port}"
        finally:
            serve.shutdown()


@contextmanager
def _following(doors: Doors) -> Iterator[None]:
    """Keeps the doors those of the replicas there are, where all of them are on this node."""
    handle, node, ended = serve.get_app_handle(APP_NAME), ray.get_runtime_context().get_node_id(), threading.Event()

    def follow() -> None:
        while not ended.is_set():
            try:
                found = handle.broadcast("door").results(timeout_s=_DOORS_TIMEOUT_S)
            except Exception:  # a replica that dies may raise anything of Ray's: its proxy answers then
                found = []
            doors.set([port for _, port in found] if {at for at, _ in found} == {node} else [])
            ended.wait(_DOORS_EVERY_S)

    thread = threading.Thread(target=follow, name="diki-serve-doors", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_DOORS_TIMEOUT_S)


def absolute(storage: str) -> str:
    return storage if "://" in storage else str(Path(storage).expanduser().resolve())


def _run(settings: Settings, replicas: int, actor_options: dict[str, float]) -> None:
    there = ray.cluster_resources()
    for resource, wanted in (("CPU", actor_options["num_cpus"]), ("GPU", actor_options["num_gpus"])):
        if replicas * wanted > there.get(resource, 0.0):
            raise ConfigError(
                f"{replicas} replicas with {wanted:g} {resource} each do not fit into {there.get(resource, 0.0):g} "
                f"{resource}: ask for fewer."
            )
    try:
        serve.run(deploy(settings, num_replicas=replicas, ray_actor_options=actor_options), name=APP_NAME)
    except RuntimeError as error:
        raise ConfigError(f"no replica could be started: {_reason(str(error))}") from error


def _reason(message: str) -> str:
    """Returns the last line of a replica's traceback, where the reason is."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reasons = [line for line in lines if "Error: " in line]
    return (reasons or lines)[-1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _wait_for_proxy(upstream: str) -> None:
    deadline = time.monotonic() + _PROXY_START_S
    while True:
        try:
            with urlopen(f"{upstream}/-/healthz", timeout=2):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"Ray Serve's proxy does not answer on this machine ({error}): start the job on the cluster's "
                    "head, as `ray job submit` does."
                ) from error
        time.sleep(0.1)
