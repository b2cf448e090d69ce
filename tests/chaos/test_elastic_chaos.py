"""`train.min_workers` on a cluster of several nodes on this machine: a group with fewer workers than it may have that
loses a node without a spare, and one that a node is added for. One CPU a node and none on the head.

The modules are those of an undisturbed run to rounding, from the same samples in the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from job_runs import Run, wait_until

from diki_ray.model.module import TaskModule
from diki_ray.runtime.store import RunStore

pytestmark = pytest.mark.timeout(1200)
ELASTIC = ("train.num_workers=3", "train.min_workers=1", "train.resize_every_s=2", "train.cpus_per_worker=1")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[object]:
    """A cluster without workers' nodes yet; the faults' file is known to its nodes from their start."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIKI_FAULTS", str(tmp_path / "faults.json"))
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 4},
            },
        )
        yield cluster
        cluster.shutdown()


def modules(run: Run) -> dict[str, TaskModule]:
    store = RunStore.open(f"{run.folder}/storage", "debug")
    return {e.task: TaskModule.from_bytes(store.read_module(e.digest)) for e in store.modules()}


def assert_same_to_rounding(run: Run, undisturbed: Run) -> None:
    mine, expected = modules(run), modules(undisturbed)
    assert mine.keys() == expected.keys()
    for task, module in expected.items():
        assert mine[task].provenance["consumed"] == module.provenance["consumed"]
        assert mine[task].provenance["num_steps"] == module.provenance["num_steps"]
        for name, array in module.parameters.items():
            np.testing.assert_allclose(mine[task].parameters[name], array, atol=1e-5, rtol=0, err_msg=f"{task} {name}")


@pytest.mark.long
def test_fewer_nodes_than_workers_and_one_of_them_lost(nodes, tmp_path: Path, undisturbed: Run) -> None:
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    run = Run(tmp_path, undisturbed.prepared)
    done = run.start(
        f"cluster.address={nodes.address}",
        *ELASTIC,
        "train.max_failures=1",
        faults=[{"kind": "kill-node", "task": "gems", "rank": 1, "step": 2}],
    )
    assert done.returncode == 0, done.stderr
    assert run.num_fired() == 1
    assert "with 1 to 3 workers" in done.stdout
    assert_same_to_rounding(run, undisturbed)
    sizes = {task: module.provenance["world_sizes"] for task, module in modules(run).items()}
    assert sizes == {"digits": [[0, 2]], "gems": [[0, 2], [2, 1]]}


@pytest.mark.long
def test_a_node_that_comes_in_the_middle_of_a_task_is_taken(nodes, tmp_path: Path, undisturbed: Run) -> None:
    nodes.add_node(num_cpus=1)
    run = Run(tmp_path, undisturbed.prepared)
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
    assert_same_to_rounding(run, undisturbed)
    sizes = {task: module.provenance["world_sizes"] for task, module in modules(run).items()}
    assert sizes == {"digits": [[0, 1], [4, 2]], "gems": [[0, 2]]}
