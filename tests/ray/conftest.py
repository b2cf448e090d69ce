"""A local Ray cluster for the tests of a file: the next file may want one of its own in this process."""

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="module")
def local_cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, namespace="diki_ray")
    yield
    ray.shutdown()
