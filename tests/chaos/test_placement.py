"""What waits and does not compute stays beside its driver: on several raylets, whose workers were there first."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from diki_ray.config import Config, parse
from diki_ray.runs.store_client import NAMESPACE, StoreClient, actor_name
from diki_ray.runs.train import group

pytestmark = [pytest.mark.cluster, pytest.mark.long]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have this folder on their path
NUM_STORES = 6


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The node of this driver: without a CPU to give, as the head in cluster/kuberay, beside two nodes that work."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    cluster.connect(namespace=NAMESPACE)
    node = ray.get_runtime_context().get_node_id()
    assert node not in ray.get([where.options(scheduling_strategy="SPREAD").remote() for _ in range(8)])
    yield node
    ray.shutdown()
    cluster.shutdown()


@ray.remote(num_cpus=1)
def where() -> str:
    return ray.get_runtime_context().get_node_id()


def wait_for_free_cpus(number: int) -> None:
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < number:
        assert time.monotonic() < deadline, "a placement group that was removed still holds its CPU"
        time.sleep(0.2)


def node_of_store(client: StoreClient) -> str:
    actor: Any = ray.get_actor(actor_name(client.handle.storage, client.handle.run), NAMESPACE)
    return ray.get(actor.__ray_call__.remote(lambda store: ray.get_runtime_context().get_node_id()))


def test_every_store_is_on_the_node_of_its_driver(head: str, tmp_path: Path) -> None:
    stores = [StoreClient.start(str(tmp_path), f"run{number}") for number in range(NUM_STORES)]
    try:
        assert [node_of_store(store) for store in stores] == [head] * NUM_STORES
    finally:
        for store in stores:
            store.stop()


def test_the_store_of_a_sweeps_trial_is_on_the_node_of_the_trial(head: str, tmp_path: Path) -> None:
    def trial(run: str) -> tuple[str, str]:
        store = StoreClient.start(str(tmp_path), run)
        try:
            return ray.get_runtime_context().get_node_id(), node_of_store(store)
        finally:
            store.stop()

    bundle = placement_group([{"CPU": 1}])  # Tune places a trial in one, and what it starts with it
    in_bundle = PlacementGroupSchedulingStrategy(bundle, placement_group_capture_child_tasks=True)
    remote = ray.remote(num_cpus=1, scheduling_strategy=in_bundle)(trial)
    for number in range(3):
        own, of_store = ray.get(remote.remote(f"trial{number}"))
        assert own == of_store != head
    remove_placement_group(bundle)
    wait_for_free_cpus(4)


def test_the_drivers_of_concurrent_groups_are_on_the_node_of_the_run(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(config: Config, tasks: list[Any], folder: Path) -> None:
        (folder / tasks[0].key).write_text(ray.get_runtime_context().get_node_id())  # the only one of its group

    monkeypatch.setattr(group, "_train_group", noted)
    config = parse(
        {
            "run": {"name": "r", "storage": str(tmp_path)},
            "tasks": [{"data": "embedded:digits"}],
            "train": {"device": "cpu", "num_workers": 1, "cpus_per_worker": 1},
            "schedule": {"concurrent_tasks": 4},
        }
    )
    tasks = [SimpleNamespace(key=f"task{n}", predecessor=None, num_images_trained=1) for n in range(4)]
    group.train(config, tasks, tmp_path)  # type: ignore[arg-type]
    assert [(tmp_path / task.key).read_text() for task in tasks] == [head] * len(tasks)
