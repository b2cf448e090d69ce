"""The Ray cluster of a job: joined where there is one to join, else started on this machine and stopped at the end."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from diki_ray.config import Config
from diki_ray.errors import ConfigError
from diki_ray.runs.plan import device_of

WAIT_FOR_NODES_S = 600.0
"""An autoscaler that starts from 0 needs minutes for its first node; a cluster without one is judged at once."""


@contextmanager
def cluster(config: Config, dashboard: bool = False) -> Iterator[None]:
    """Connects to `cluster.address`, or to the cluster that runs this job, or to one started here for the job alone.

    In a process that is connected already (a notebook, a test) that connection is used and kept.

    Raises:
        ConfigError: the cluster cannot be reached, runs another Ray version, or is too small for what is asked.
    """
    if ray.is_initialized():
        _check_capacity(config, joined=False)
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    # RAY_AUTH_MODE is left alone: Ray's ports listen on every interface, and where nothing is said a cluster started
    # here asks for the token that Ray keeps in the user's home directory.
    if address is not None:
        _check_storage(config)
    try:
        ray.init(
            address=address or "local",
            num_cpus=None if address else config.cluster.num_cpus,
            include_dashboard=dashboard if address is None else None,
            namespace="diki_ray",
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except Exception as error:  # Ray raises a plain one where its own processes are not up in half a minute
        raise ConfigError(_not_there(address, error)) from error
    try:
        _check_capacity(config, joined=address is not None)
        yield
    finally:
        ray.shutdown()


def _check_storage(config: Config) -> None:
    """A job's folder on a cluster is a temporary copy, and other nodes have other disks."""
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
    """Refuses what could never be scheduled; without this Ray would wait for ever. A joined cluster may still grow."""
    there = ray.cluster_resources()
    train, evaluate = config.train, config.evaluate
    for section, workers, cpus in (
        ("train", train.min_workers or train.num_workers, train.cpus_per_worker),
        ("evaluate", evaluate.num_workers, evaluate.cpus_per_worker),
    ):
        need = workers * cpus
        if not joined and need > there.get("CPU", 0):
            raise ConfigError(
                f"{section}.num_workers={workers} with {section}.cpus_per_worker={cpus:g} needs {need:g} CPUs and this "
                f"machine's cluster has {there.get('CPU', 0):g}; lower one of them, or set cluster.num_cpus higher."
            )
    if not joined and device_of(config) == "cuda" and there.get("GPU", 0) < (train.min_workers or train.num_workers):
        raise ConfigError(
            f"train.device=cuda with train.num_workers={train.num_workers}: Ray sees {there.get('GPU', 0):g} GPUs "
            "on this machine; use train.device=cpu, fewer workers, or a cluster with GPUs."
        )


def _not_there(address: str | None, error: BaseException) -> str:
    if address is None:
        return (
            f"no Ray cluster could be started on this machine ({_first_line(error)}). See that it has CPU and memory "
            "to spare and run the same command again, or name a running cluster in cluster.address."
        )
    return (
        f"cluster.address={address!r}: no Ray cluster could be joined there ({_first_line(error)}). Check the "
        "address, the token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH) and that both sides run the same Ray version, or "
        "leave cluster.address out to start one on this machine."
    )


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
