"""Two nodes of `ray start` with a network between them: a token-protected head without room for training, and a node
in a network namespace of its own that does the work. Storage is S3 over HTTP, reached by both."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from test_submission import PORTS, Head, running_head, token_environment

OTHER_PORTS = {name: port + 100 for name, port in PORTS.items()}
"""So that these tests and those of submission can run side by side."""
HEAD_IP, NODE_IP = "10.213.77.1", "10.213.77.2"
NAMESPACE, HEAD_LINK, NODE_LINK = (f"diki{os.getpid()}{end}" for end in ("", "a", "b"))

KEYS = {"region_name": "us-east-1", "aws_access_key_id": "test", "aws_secret_access_key": "test"}


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
def s3(network: None) -> Iterator[dict[str, str]]:
    """The environment of a client of an S3 server that holds the bucket `runs`."""
    server = ThreadedMotoServer(ip_address=HEAD_IP, port=0, verbose=False)
    server.start()
    url = f"http://{HEAD_IP}:{server.get_host_and_port()[1]}"
    boto3.client("s3", endpoint_url=url, **KEYS).create_bucket(Bucket="runs")
    yield {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@pytest.fixture(scope="module")
def two_nodes(s3: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("nodes")
    environment = token_environment(folder) | s3
    room_for_the_driver = ("--num-cpus=1", f"--node-ip-address={HEAD_IP}")
    with running_head(folder, environment, *room_for_the_driver, ports=OTHER_PORTS) as head:
        # A session's folder of its own: where it is shared, one node deletes the other's working directory.
        short = Path("/tmp") / f"{NAMESPACE}n"
        node = subprocess.Popen(
            [
                *("ip", "netns", "exec", NAMESPACE, str(Path(sys.executable).parent / "ray"), "start", "--block"),
                *(f"--address={HEAD_IP}:{OTHER_PORTS['--port']}", f"--node-ip-address={NODE_IP}", "--num-cpus=4"),
                f"--temp-dir={short}",
            ],
            cwd=folder,
            env=environment | {"GLOO_SOCKET_IFNAME": NODE_LINK},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 120
            while NODE_IP not in head.ray("list", "nodes", "--format=json").stdout:
                assert node.poll() is None, "the node ended"
                assert time.monotonic() < deadline, "the node did not join"
                time.sleep(1)
            yield head
        finally:
            node.send_signal(signal.SIGTERM)
            node.wait(60)
            shutil.rmtree(short, ignore_errors=True)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_submitted_job_trains_on_the_other_node_and_stores_on_s3(
    two_nodes: Head, s3: dict[str, str], tmp_path: Path
) -> None:
    two_workers = ("train.num_workers=2", "train.cpus_per_worker=1")  # more than the head has beside the store's actor
    done = two_nodes.submit("across", "s3://runs/team", *two_workers, data=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing: zero-shot" in two_nodes.ray("job", "logs", "across").stdout

    nodes = json.loads(two_nodes.ray("list", "nodes", "--format=json").stdout)
    address = {node["node_id"]: node["node_ip"] for node in nodes}
    assert set(address.values()) == {HEAD_IP, NODE_IP}
    listed = two_nodes.ray("list", "actors", "--filter=class_name=RayTrainWorker", "--format=json", "--limit=100")
    workers = json.loads(listed.stdout)
    assert len(workers) == 2  # one group for both tasks
    assert {address[worker["node_id"]] for worker in workers} == {NODE_IP}

    client = boto3.client("s3", endpoint_url=s3["AWS_ENDPOINT_URL"], **KEYS)
    keys = [o["Key"] for o in client.list_objects_v2(Bucket="runs")["Contents"]]
    assert sum(k.startswith("team/library/modules/") for k in keys) == 2
    body = client.get_object(Bucket="runs", Key="team/runs/debug/results/results.json")["Body"].read()
    assert len(json.loads(body)["accuracy"]) == 2
