"""A whole run whose storage is S3, over real HTTP: modules, results and Ray Train's own folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_process import run_job
from s3_server import s3_bucket


@pytest.mark.long
@pytest.mark.timeout(400)
def test_learn_and_run_again_on_s3(prepared: Path) -> None:
    command = ("continual", "--config", "configs/debug.yaml", "run.storage=s3://runs/team", f"data.root={prepared}")
    with s3_bucket() as bucket:
        assert "nothing: zero-shot" in run_job(*command, **bucket.environment).stdout
        bucket.assert_holds_a_debug_run("team")
        assert "nothing to train or evaluate" in run_job(*command, **bucket.environment).stdout
