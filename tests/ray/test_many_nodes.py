"""Two nodes of `ray start` with a network between them: a token-protected head, and a node in a network namespace of
its own. Each has room for one worker, so their collectives cross the network. Storage is S3 over HTTP, reached by
both."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import Bucket, s3_bucket
from token_head import PORTS, RAY, Head, running_head, started, token_environment, wait_until

OTHER_PORTS = {name: port + 100 for name, port in PORTS.items()}
"""So that these tests and those of submission can run side by side."""
HEAD_IP, NODE_IP = "10.213.77.1", "10.213.77.2"
NAMESPACE, HEAD_LINK, NODE_LINK = (f"diki{os.getpid()}{end}" for end in ("", "a", "b"))


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """A namespace at NODE_IP, joined by a pair of virtual links to this one at HEAD_IP."""
    if shutil.which("ip") is None:
        pytest.skip("Many nodes are NOT tried: `ip` is not installed (Debian's iproute2)")
    try:
        ip("netns", "add", NAMESPACE)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"Many nodes are NOT tried: no network namespace may be made here ({error.stderr.strip()})")
    try:
        ip("link", "add", HEAD_LINK, "type", "veth", "peer", "name", NODE_LINK, "netns", NAMESPACE)
        ip("addr", "add", f"{HEAD_IP}/30", "dev", HEAD_LINK)
        ip("link", "set", HEAD_LINK, "up")
        ip("-n", NAMESPACE, "addr", "add", f"{NODE_IP}/30", "dev", NODE_LINK)
        ip("-n", NAMESPACE, "link", "set", NODE_LINK, "up")
        ip("-n", NAMESPACE, "link", "set", "lo", "up")
        yield
    finally:
        ip("netns", "delete", NAMESPACE)  # and with it the links


@pytest.fixture(scope="module")
def bucket(network: None) -> Iterator[Bucket]:
    with s3_bucket(HEAD_IP) as bucket:
        yield bucket


@pytest.fixture(scope="module")
def two_nodes(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("nodes")
    environment = token_environment(folder) | bucket.environment
    # A session's folder of its own: where it is shared, one node deletes the other's working directory.
    session = Path("/tmp") / f"{NAMESPACE}n"
    join = [
        *("ip", "netns", "exec", NAMESPACE, RAY, "start", "--block"),
        *(f"--address={HEAD_IP}:{OTHER_PORTS['--port']}", f"--node-ip-address={NODE_IP}", "--num-cpus=1"),
        f"--temp-dir={session}",
    ]
    with (
        running_head(folder, environment, "--num-cpus=1", f"--node-ip-address={HEAD_IP}", ports=OTHER_PORTS) as head,
        started(join, folder, environment, session) as node,
    ):
        wait_until(lambda: NODE_IP in head.ray("list", "nodes", "--format=json").stdout, "the node to join", node)
        yield head


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_submitted_job_trains_on_both_nodes_and_stores_on_s3(two_nodes: Head, bucket: Bucket, tmp_path: Path) -> None:
    done = two_nodes.submit(
        "across",
        *("jobs/continual.py", "--config", "configs/debug.yaml"),
        *("run.storage=s3://runs/team", f"data.root={tmp_path}/prepared"),
        *("train.num_workers=2", "train.cpus_per_worker=1"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing: zero-shot" in two_nodes.logs("across")

    nodes = json.loads(two_nodes.ray("list", "nodes", "--format=json").stdout)
    address = {node["node_id"]: node["node_ip"] for node in nodes}
    assert set(address.values()) == {HEAD_IP, NODE_IP}
    listed = two_nodes.ray("list", "actors", "--filter=class_name=RayTrainWorker", "--format=json", "--limit=100")
    workers = json.loads(listed.stdout)
    assert len(workers) == 2  # one group for both tasks
    assert {address[worker["node_id"]] for worker in workers} == {HEAD_IP, NODE_IP}
    bucket.assert_holds_a_debug_run("team")
