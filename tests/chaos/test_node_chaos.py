"""Nodes that are lost or drained in the middle of a task, on a cluster of several nodes on this machine.

One CPU a node and none on the head: each of the two workers has a node of its own, and a third stands by.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from job_runs import Run, assert_equal, cluster_of_nodes, wait_until

pytestmark = pytest.mark.timeout(600)
ONE_WORKER_A_NODE = ("train.cpus_per_worker=1", "train.max_failures=1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    """(cluster, the folder of the run on it)."""
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "faults.json").write_text("[]")
    with cluster_of_nodes(folder / "faults.json") as cluster:
        for _ in range(3):
            cluster.add_node(num_cpus=1)
        yield cluster, folder


def run_on(cluster: tuple, prepared: Path) -> Run:
    """A run whose storage is empty and whose faults are those of the nodes."""
    _, folder = cluster
    shutil.rmtree(folder / "storage", ignore_errors=True)
    for mark in [*folder.glob("fired.*"), *folder.glob("go.*")]:
        mark.unlink()
    return Run(folder, prepared)


@pytest.mark.long
def test_a_node_lost_in_the_middle_of_a_task_changes_nothing(cluster: tuple, undisturbed: Run) -> None:
    run = run_on(cluster, undisturbed.prepared)
    done = run.start(
        f"cluster.address={cluster[0].address}",
        *ONE_WORKER_A_NODE,
        faults=[{"kind": "kill-node", "task": "gems", "rank": 1, "step": 2}],
    )
    assert done.returncode == 0, done.stderr
    assert run.num_fired() == 1
    assert_equal(run, undisturbed)


@pytest.mark.long
def test_a_drained_node_takes_an_extra_checkpoint_and_no_failure_budget(cluster: tuple, undisturbed: Run) -> None:
    nodes, _ = cluster
    nodes.add_node(num_cpus=1)
    run = run_on(cluster, undisturbed.prepared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.2")
        job = run.begin(
            f"cluster.address={nodes.address}",
            *ONE_WORKER_A_NODE,
            "train.max_failures=0",
            "train.checkpoint_every_steps=1000",
            "train.collective_timeout_s=60",
            faults=[
                {"kind": "wait", "task": "gems", "rank": 1, "step": 3},
                {"kind": "hang", "task": "gems", "rank": 1, "step": 4},
            ],
        )
    wait_until(lambda: run.has_fired(0), 200, "the second task to come to step 3")
    wait_until(lambda: run.newest_step() == 3, 20, "the checkpoint of the first epoch's end")
    drain(nodes.address, busy_node(nodes.address), deadline_s=12)
    time.sleep(2)  # ten times the interval in which Ray Train looks for drained nodes
    (run.folder / "go.0").touch()
    wait_until(lambda: run.has_fired(1), 60, "step 4")
    wait_until(lambda: run.newest_step() == 4, 5, "the extra checkpoint")
    done = job.wait()
    assert done.returncode == 0, done.stderr
    assert_equal(run, undisturbed)


def busy_node(address: str) -> str:
    """Id of a node whose CPU is taken, so that a worker is on it."""
    code = (
        "import json, ray; ray.init(address=%r, log_to_driver=False, logging_level='ERROR');"
        "free = ray._private.state.available_resources_per_node();"
        "print(json.dumps([n['NodeID'] for n in ray.nodes() if n['Alive'] and n['Resources'].get('CPU')"
        " and not free[n['NodeID']].get('CPU')]))"
    )
    done = subprocess.run([sys.executable, "-c", code % address], capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout.splitlines()[-1])[0]


def drain(address: str, node: str, deadline_s: int) -> None:
    """What a cloud's notice of reclaiming a spot machine becomes in Ray."""
    subprocess.run(
        [
            *(Path(sys.executable).with_name("ray"), "drain-node", "--address", address, "--node-id", node),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot machine reclaimed"),
            *("--deadline-remaining-seconds", str(deadline_s)),
        ],
        check=True,
        capture_output=True,
        timeout=60,
        env=os.environ,
    )
