"""`train.min_workers` on a cluster of several nodes on this machine: a group with fewer workers than it may have that
loses a node without a spare, and one that a node is added for. One CPU a node and none on the head.

The modules are bit-equal to those of one worker that was never disturbed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_runs import Run, assert_equal, cluster_of_nodes, wait_until

from diki_ray.store.run_store import RunStore

pytestmark = pytest.mark.timeout(1200)
PARTS = "train.num_parts=3"
ELASTIC = (PARTS, "train.num_workers=3", "train.min_workers=1", "train.resize_every_s=2", "train.cpus_per_worker=1")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, undisturbed: Run) -> Run:
    """The same three parts a step, all by one worker."""
    run = Run(tmp_path_factory.mktemp("alone"), undisturbed.prepared)
    done = run.start(PARTS, "train.num_workers=1")
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Any]:
    with cluster_of_nodes(tmp_path / "faults.json") as cluster:
        yield cluster


def world_sizes(run: Run) -> dict[str, list[list[int]]]:
    """Task -> [step, workers from there on]."""
    modules = RunStore.open(f"{run.folder}/storage", "debug").modules()
    return {entry.task: entry.metadata["world_sizes"] for entry in modules}


@pytest.mark.long
def test_fewer_nodes_than_workers_and_one_of_them_lost(nodes: Any, tmp_path: Path, alone: Run) -> None:
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    run = Run(tmp_path, alone.prepared)
    done = run.start(
        f"cluster.address={nodes.address}",
        *ELASTIC,
        "train.max_failures=1",
        faults=[{"kind": "kill-node", "task": "gems", "rank": 1, "step": 2}],
    )
    assert done.returncode == 0, done.stderr
    assert run.num_fired() == 1
    assert "with 1 to 3 workers" in done.stdout
    assert_equal(run, alone)
    assert world_sizes(run) == {"digits": [[0, 2]], "gems": [[0, 2], [2, 1]]}


@pytest.mark.long
def test_a_node_that_comes_in_the_middle_of_a_task_is_taken(nodes: Any, tmp_path: Path, alone: Run) -> None:
    nodes.add_node(num_cpus=1)
    run = Run(tmp_path, alone.prepared)
    job = run.begin(
        f"cluster.address={nodes.address}",
        *ELASTIC,
        "train.max_failures=0",
        faults=[{"kind": "wait", "task": "digits", "rank": 0, "step": 4}],
    )
    wait_until(lambda: run.has_fired(0), 200, "the first task to come to step 4")
    nodes.add_node(num_cpus=1)  # the group is ended in its wait, and started again with two
    done = job.wait()
    assert done.returncode == 0, done.stderr
    assert_equal(run, alone)
    assert world_sizes(run) == {"digits": [[0, 1], [4, 2]], "gems": [[0, 2]]}
