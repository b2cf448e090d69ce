"""A whole run whose storage is S3, over real HTTP: modules, results and Ray Train's own folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.timeout(400)
def test_learn_and_run_again_on_s3(tmp_path: Path) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    credentials = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client("s3", endpoint_url=credentials["AWS_ENDPOINT_URL"], region_name="us-east-1",
                          aws_access_key_id="test", aws_secret_access_key="test")  # fmt: skip
    client.create_bucket(Bucket="runs")
    command = [
        *(sys.executable, "jobs/continual.py", "--config", "configs/debug.yaml"),
        *("run.storage=s3://runs/team", f"data.root={tmp_path}/prepared"),
    ]

    def run() -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | credentials, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        assert "nothing: zero-shot" in run()
        keys = [o["Key"] for o in client.list_objects_v2(Bucket="runs")["Contents"]]
        assert sum(k.startswith("team/library/modules/") for k in keys) == 2
        body = client.get_object(Bucket="runs", Key="team/runs/debug/results/results.json")["Body"].read()
        assert len(json.loads(body)["accuracy"]) == 2
        assert "nothing to train or evaluate" in run()
    finally:
        server.stop()
