"""A bucket on a server that speaks S3 over real HTTP, for whole runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
from moto.server import ThreadedMotoServer


@dataclass(frozen=True)
class Bucket:
    client: Any
    environment: dict[str, str]
    """What a process needs to reach it as s3://runs."""

    def assert_holds_a_debug_run(self, team: str) -> None:
        """Both modules of configs/debug.yaml and their results, below s3://runs/TEAM."""
        keys = [found["Key"] for found in self.client.list_objects_v2(Bucket="runs")["Contents"]]
        assert sum(key.startswith(f"{team}/library/modules/") for key in keys) == 2
        results = self.client.get_object(Bucket="runs", Key=f"{team}/runs/debug/results/results.json")
        assert len(json.loads(results["Body"].read())["accuracy"]) == 2


@contextmanager
def s3_bucket(ip: str = "127.0.0.1") -> Iterator[Bucket]:
    """The bucket `runs` of a server at this address."""
    server = ThreadedMotoServer(ip_address=ip, port=0, verbose=False)
    server.start()
    url, region = f"http://{ip}:{server.get_host_and_port()[1]}", "us-east-1"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    client = boto3.client("s3", endpoint_url=url, region_name=region, **keys)
    environment = {"AWS_ENDPOINT_URL": url, "AWS_REGION": region, "AWS_DEFAULT_REGION": region}
    try:
        client.create_bucket(Bucket="runs")
        yield Bucket(client, environment | {name.upper(): value for name, value in keys.items()})
    finally:
        server.stop()
