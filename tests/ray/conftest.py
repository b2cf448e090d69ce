"""One local Ray cluster for all tests that do not kill it. Runs on it have storages of their own, and actors too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def local_cluster() -> Iterator[str]:
    """This process is connected to it; its address is for processes that join."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIKI_LIGHT_IMPORT", "1")  # in the workers, as on a cluster that a command starts
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, namespace="diki_ray")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
