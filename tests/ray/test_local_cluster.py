"""Ray's token is private whatever the umask, and a cluster started here is not heard of elsewhere (real sockets)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diki_ray.runs.local_cluster import keep_token_private


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".ray" / "auth_token"


def test_a_token_that_is_missing_is_made_for_its_user_alone(token: Path, capsys: pytest.CaptureFixture[str]) -> None:
    former = os.umask(0o022)
    try:
        keep_token_private()
    finally:
        os.umask(former)
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64
    made = token.read_text()
    keep_token_private()
    assert token.read_text() == made
    assert os.listdir(token.parent) == ["auth_token"]
    assert capsys.readouterr().err == ""


def test_one_that_others_can_read_is_mended_with_a_word(token: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token.parent.mkdir()
    token.write_text("a" * 64)
    token.chmod(0o644)
    keep_token_private()
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() == "a" * 64
    said = capsys.readouterr().err
    assert "mode 0644" in said
    assert str(token) in said


@pytest.mark.cluster
def test_a_cluster_started_here_listens_on_loopback_alone(token: Path) -> None:
    code = """
import psutil, ray
from diki_ray.runs.cluster import connected

with connected("local", num_cpus=1):
    ray.get(ray.remote(lambda: 1).remote())
    session = ray._private.worker._global_node
    started = [process.process.pid for several in session.all_processes.values() for process in several]
    family = [psutil.Process()] + [psutil.Process(pid) for pid in started]
    family += [child for process in family for child in process.children(recursive=True)]
    for process in set(family):
        for socket in process.net_connections():
            if socket.status == "LISTEN":
                print(socket.laddr.ip)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    listening = done.stdout.split()
    assert len(listening) > 4, done.stderr
    assert set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert token.stat().st_mode & 0o777 == 0o600
