"""One local Ray cluster for all tests of this folder that run in this process."""

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def local_cluster() -> Iterator[None]:
    if ray.is_initialized():  # another folder's fixture of this process
        yield
        return
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, namespace="diki_ray")
    yield
    ray.shutdown()
