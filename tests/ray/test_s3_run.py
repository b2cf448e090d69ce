"""A whole run whose storage is S3, over real HTTP: modules, results and Ray Train's own folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from s3_server import s3_bucket

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.timeout(400)
def test_learn_and_run_again_on_s3(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "jobs/continual.py", "--config", "configs/debug.yaml"),
        *("run.storage=s3://runs/team", f"data.root={tmp_path}/prepared"),
    ]
    with s3_bucket() as bucket:

        def run() -> str:
            environment = os.environ | bucket.environment
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert "nothing: zero-shot" in run()
        bucket.assert_holds_a_debug_run("team")
        assert "nothing to train or evaluate" in run()
