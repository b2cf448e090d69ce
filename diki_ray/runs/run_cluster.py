"""Connects a run to its cluster (cluster.py does) and refuses it where storage or capacity are not what the
configuration asks for, before any work starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from diki_ray.config import Config
from diki_ray.errors import ConfigError
from diki_ray.runs.cluster import connected
from diki_ray.runs.plan import device_of


@contextmanager
def cluster(config: Config, dashboard: bool = False, runtime_env: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Keep this process connected to the cluster in `cluster.address`, or as `connected` finds or starts one.

    runtime_env: of every task and actor of this job.

    Raises:
        ConfigError: the cluster cannot be reached, runs another Ray version, or is too small for what is asked.
    """
    with connected(
        config.cluster.address, num_cpus=config.cluster.num_cpus, dashboard=dashboard, runtime_env=runtime_env
    ) as joined:
        if joined:
            _check_storage(config)
        _check_capacity(config, joined)
        yield


def _check_storage(config: Config) -> None:
    """Refuse relative places: a job's folder on a cluster is a temporary copy, and other nodes have other disks."""
    places = [("run.storage", config.run.storage), ("data.root", config.data.root)]
    if config.telemetry.trackers:
        places.append(("telemetry.tracking_root", config.telemetry.tracking_root))
    for field, place in places:
        if "://" not in place and not os.path.isabs(os.path.expanduser(place)):
            raise ConfigError(
                f"{field}={place!r} is relative: on a cluster it would lie in the job's temporary folder and be lost. "
                "Give an absolute path that the nodes share, or s3://, gs:// or az://."
            )


def _check_capacity(config: Config, joined: bool) -> None:
    """Refuse what could never be scheduled, for which Ray would wait for ever. A joined cluster may still grow."""
    there = ray.cluster_resources()
    train, evaluate = config.train, config.evaluate
    for section, workers, cpus in (
        ("train", train.min_workers or train.most_workers, train.cpus_per_worker),
        ("evaluate", evaluate.num_workers, evaluate.cpus_per_worker),
    ):
        need = workers * cpus
        if not joined and need > there.get("CPU", 0):
            raise ConfigError(
                f"{section}.num_workers={workers} with {section}.cpus_per_worker={cpus:g} needs {need:g} CPUs and this "
                f"machine's cluster has {there.get('CPU', 0):g}; lower one of them, or set cluster.num_cpus higher."
            )
    if not joined and device_of(config) == "cuda" and there.get("GPU", 0) < (train.min_workers or train.most_workers):
        raise ConfigError(
            f"train.device=cuda with train.num_workers={train.num_workers}: Ray sees {there.get('GPU', 0):g} GPUs "
            "on this machine; use train.device=cpu, fewer workers, or a cluster with GPUs."
        )
