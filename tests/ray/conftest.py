"""One local Ray cluster for all tests that do not kill it. Runs on it have storages of their own, and actors too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from diki_ray.commands.app import WORKERS_ENVIRONMENT


@pytest.fixture(scope="session")
def local_cluster() -> Iterator[str]:
    """This process is connected to it; its address is for processes that join."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in WORKERS_ENVIRONMENT.items():  # in the workers, as on a cluster that a command starts
            patch.setenv(name, value)
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, namespace="diki_ray")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
