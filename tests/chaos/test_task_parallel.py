"""Tasks side by side on a cluster of three nodes: other places, the same bits."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from rich.console import Console

from diki_ray.config import Config, load
from diki_ray.config.sweep import SweepConfig
from diki_ray.runs.continual import run_continual
from diki_ray.runs.sweep.sweep import run_sweep
from diki_ray.store.objects import Objects

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]
DEBUG = Path(__file__).parents[2] / "configs" / "debug.yaml"


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    """No CPU on the head, one on each of two nodes: two groups of one worker can run, on different nodes."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, namespace="diki_ray")
    yield
    ray.shutdown()
    cluster.shutdown()


def config(folder: Path, name: str, concurrent_tasks: int) -> Config:
    return load(
        DEBUG,
        [
            f"run.storage={folder / name}",
            f"data.root={folder}/prepared",
            f"schedule.concurrent_tasks={concurrent_tasks}",
            "evaluate.cpus_per_worker=0.5",
        ],
    )


def digests(storage: Path) -> dict[str, str]:
    """Key -> digest of every module of the library; beside it stands what learning cost, which is never the same."""
    records = [storage / info.path for info in Objects.open(str(storage)).list("library/keys")]
    return {content["key"]: content["digest"] for content in (json.loads(r.read_text())["content"] for r in records)}


@contextmanager
def watching() -> Iterator[tuple[list[set[str]], set[tuple[str, str]]]]:
    """Seen now and then: the nodes of all worker groups that there were at the same time; (class, node) of what only
    waits for them."""
    seen: list[set[str]] = []
    waiting: set[tuple[str, str]] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            groups = [
                set(g["bundles_to_node_id"].values())
                for g in ray.util.placement_group_table().values()
                if g["state"] == "CREATED" and any("CPU" in b for b in g["bundles"].values())
            ]
            if len(groups) > 1:
                seen.append(set.union(*groups))
            for actor in ray._private.state.actors(actor_state_name="ALIVE").values():  # needs no dashboard
                if actor["ActorClassName"] in ("StoreActor", "TrainController"):
                    waiting.add((actor["ActorClassName"], actor["Address"]["NodeID"]))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield seen, waiting
    stop.set()
    thread.join()


def test_tasks_side_by_side_are_bit_equal_to_one_after_the_other(nodes: None, tmp_path: Path) -> None:
    with watching() as (seen, _):
        run_continual(config(tmp_path, "sequential", 1), Console(quiet=True))
    assert not seen
    with watching() as (seen, waiting):
        run_continual(config(tmp_path, "parallel", 2), Console(quiet=True))
    assert max(map(len, seen)) == 2  # two groups at once, each on a node of its own
    head = ray.get_runtime_context().get_node_id()
    assert waiting == {("StoreActor", head), ("TrainController", head)}
    sweep = SweepConfig.model_validate({"name": "s", "base": "x", "parameters": {"calibration.bias": [0.0, 1.0]}})
    with watching() as (seen, _):
        document = run_sweep(sweep, config(tmp_path, "swept", 2), lambda text: None)
    assert document["modules_trained"] == 2
    assert max(map(len, seen)) == 2

    sequential = digests(tmp_path / "sequential")
    assert len(sequential) == 2
    assert digests(tmp_path / "parallel") == sequential
    assert digests(tmp_path / "swept") == sequential

    # A trial that trains by itself leaves the same bits as a worker group.
    run_sweep(sweep, config(tmp_path, "alone", 1), lambda text: None)
    assert digests(tmp_path / "alone") == sequential
