"""Connects a process to a Ray cluster: one that is there to join, else one started here and stopped at the end.

Every job connects here, so that environment, namespace and errors are the same for all of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray._private import utils as ray_signals
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diki_ray.errors import ConfigError
from diki_ray.runs import stopping
from diki_ray.runs.local_cluster import LOOKS_OFTEN, LOOPBACK, keep_token_private, starting

LOCAL = "local"
"""The address that asks for a cluster of this process's own, whatever RAY_ADDRESS says."""

_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"

_KEEPING = {"arena_max": 1, "mmap_threshold": 2**40, "trim_threshold": 2**40, "tcache_count": 0}
"""Tunables of glibc: one heap for all threads, which does not shrink. Small blocks in a thread's cache would stand
between large ones that are free, and these would not become one again."""
_SET_BY_USERS = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@contextmanager
def connected(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    dashboard: bool = False,
    setting: str = "cluster.address",
    runtime_env: Mapping[str, Any] | None = None,
) -> Iterator[bool]:
    """Connect to the cluster at `address`, else to that in RAY_ADDRESS, else to one started here for the block alone.

    In a process that is connected already (a notebook, a test) that connection is used and kept. Yields whether an
    address was joined; `num_cpus` (all of the machine by default) and `dashboard` are those of a cluster started here.
    `setting` is what the user knows `address` by; `runtime_env` is that of every task and actor of this job.

    Raises:
        ConfigError: the cluster cannot be reached or started, or runs another Ray version.
    """
    if ray.is_initialized():
        yield False
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # RAY_AUTH_MODE is left alone: where nothing is said, a cluster started here asks for the token that Ray keeps in
    # the user's home directory.
    setting, address = (setting, address) if address else ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS") or LOCAL)
    joined = address != LOCAL
    if not joined:
        keep_token_private()
    with nullcontext() if joined else unwatched():
        try:
            with _handlers_kept(), nullcontext() if joined else starting():
                ray.init(
                    address=address,
                    num_cpus=None if joined else num_cpus,
                    include_dashboard=None if joined else dashboard,
                    _node_ip_address=None if joined else LOOPBACK,
                    _system_config=None if joined else LOOKS_OFTEN,
                    namespace="diki_ray",
                    runtime_env=dict(runtime_env or {}) or None,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
        except Exception as error:  # Ray raises a plain one where its own processes are not up in half a minute
            raise ConfigError(_not_joined(setting, address, error) if joined else _not_started(error)) from error
        try:
            yield joined
        finally:
            ray.shutdown()


def started_here() -> bool:
    """Whether the cluster is one that this process started, so that it has this machine alone and never grows."""
    node = ray._private.worker._global_node
    return node is not None and node.is_head()


@contextmanager
def unwatched() -> Iterator[None]:
    """Ray Train, called in the block, starts no process that looks whether nodes are to be taken away: nobody takes a
    cluster of this machine away from its own command, and that process took 2 of 19 s to the first step."""
    if _WATCHER in os.environ:
        yield
        return
    os.environ[_WATCHER] = "0"
    try:
        yield
    finally:
        os.environ.pop(_WATCHER, None)


def beside_this_process() -> dict[str, Any]:
    """Return the options of a task or an actor that waits and does not compute: it runs on this process's node.

    So it keeps no worker's node from being given back, nor goes with it. It runs elsewhere once this node is gone.
    """
    return {
        "num_cpus": 0,  # a worker group may ask for every CPU there is
        # One byte. What asks for nothing at all Ray 2.60 places on any node, whatever its affinity.
        "memory": 1,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
    }


def keeps_memory() -> dict[str, Any]:
    """Return the `runtime_env` of an actor that makes one pass of a model after another: it keeps what a pass took.

    By itself glibc gives a layer's memory back to the system, which clears each page when the next layer asks for it:
    on a CPU a tenth to a half of a pass (docs/benchmarks.md, "Memory that is kept"). What the user has set counts.
    glibc reads this as a process starts; later the threads have heaps of their own, which cannot grow.
    """
    if any(name in os.environ for name in _SET_BY_USERS):
        return {}
    return {"env_vars": {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={n}" for name, n in _KEEPING.items())}}


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray, started in the block, leaves the handlers of a stoppable command alone; elsewhere it sets its own.

    Ray 2.60 handles SIGTERM in Python, by an exit with code 15, and from connecting on in C++, by a dump of the stack.
    """
    if not stopping.heeded():
        yield
        return
    set_handler = ray_signals.set_sigterm_handler
    ray_signals.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray_signals.set_sigterm_handler = set_handler
        stopping.heed()


def _not_started(error: BaseException) -> str:
    return (
        f"no Ray cluster could be started on this machine ({_first_line(error)}). See that it has CPU and memory "
        "to spare and run the same command again, or name a running cluster in cluster.address."
    )


def _not_joined(setting: str, address: str, error: BaseException) -> str:
    return (
        f"{setting}={address!r}: no Ray cluster could be joined there ({_first_line(error)}). Check the "
        "address, the token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH) and that both sides run the same Ray version, or "
        f"leave {setting} out to start one on this machine."
    )


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
