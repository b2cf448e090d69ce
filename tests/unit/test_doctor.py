"""`diki-ray doctor`: each check can fail, says what to do, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
from s3_server import s3_bucket

from diki_ray.commands.app import run
from diki_ray.config import BackboneSection, load
from diki_ray.runs import doctor
from diki_ray.runs.doctor import Check, Subject, examine
from diki_ray.store.objects import LocalObjects

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Subject(str(tmp_path / "a" / "storage"), str(tmp_path / "prepared"), None, "cpu", BackboneSection(), {})


def answers(subject: Subject) -> dict[str, Check]:
    return {check.name: check for check in examine(subject)}


def test_a_fit_machine_is_ok_and_nothing_is_left_behind(subject: Subject, tmp_path: Path) -> None:
    found = answers(subject)
    assert {c.name for c in found.values() if c.status == "failed"} == set()
    assert {"versions", "devices", "storage", "conditional puts", "clock", "shared memory", "token"} <= found.keys()
    assert {"space for storage", "space for data", "cluster", "backbone"} <= found.keys()
    assert all(check.told.endswith(".") for check in found.values())
    assert list(tmp_path.iterdir()) == []


def test_a_storage_keeps_what_is_in_it(subject: Subject, tmp_path: Path) -> None:
    kept = tmp_path / "a" / "storage" / "runs" / "r"
    kept.mkdir(parents=True)
    answers(subject)
    assert [path for path in (tmp_path / "a" / "storage").rglob("*") if path != kept] == [kept.parent]


def test_a_storage_that_cannot_be_written_has_failed(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file, no folder")
    found = answers(subject)
    assert found["storage"].status == found["conditional puts"].status == found["clock"].status == "failed"
    assert str(tmp_path / "a") in found["storage"].told


def test_a_bucket_is_asked_the_same(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_bucket() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        found = answers(replace(subject, storage="s3://runs/team"))
        assert {c.status for c in found.values() if c.name in ("storage", "conditional puts", "clock")} == {"ok"}
        assert "Contents" not in bucket.client.list_objects_v2(Bucket="runs")


def test_conditional_puts_that_are_none_have_failed(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LocalObjects.put
    monkeypatch.setattr(LocalObjects, "put", lambda self, path, data, create_only=False: plain(self, path, data))
    check = answers(subject)["conditional puts"]
    assert (check.status, "8 of 8 writers" in check.told) == ("failed", True)


def test_a_clock_that_differs_is_said(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1.7e9)
    check = answers(subject)["clock"]
    assert (check.status, "NTP" in check.told) == ("warning", True)


@pytest.mark.parametrize(("free", "status"), [(10**8, "failed"), (10**9, "warning"), (10**11, "ok")])
def test_little_space_is_said(free: int, status: str, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(free, 0, free))
    found = answers(subject)
    assert {found[f"space for {what}"].status for what in ("storage", "data")} == {status}
    assert found["shared memory"].status == ("ok" if status == "ok" else "warning")


def test_a_token_that_others_can_read_is_said(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert answers(subject)["token"].status == "ok"
    assert not path.exists()
    path.write_text("secret")
    path.chmod(0o644)
    check = answers(subject)["token"]
    assert (check.status, f"chmod 600 {path}" in check.told, "secret" in check.told) == ("warning", True, False)
    path.chmod(0o600)
    assert answers(subject)["token"].status == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert answers(subject)["token"].status == "warning"


@contextmanager
def job_server(reply: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *arguments: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("reply", "status", "told"),
    [
        (json.dumps({"ray_version": ray.__version__}).encode(), "ok", "as this machine does"),
        (b'{"ray_version": "1.0.0"}', "failed", "install the same version"),
        (b"[]", "failed", "otherwise than Ray's job server"),
        (b"<html>", "failed", "cannot be joined"),
    ],
)
def test_a_clusters_version_is_compared(reply: bytes, status: str, told: str) -> None:
    with job_server(reply) as address:
        check = doctor._cluster(address)
    assert (check.status, told in check.told) == (status, True)


@pytest.mark.parametrize("scheme", ["", "ray://", "http://"])
def test_an_address_at_which_nobody_listens_is_said_soon(scheme: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        check = doctor._cluster(address)
    assert (check.status, address in check.told) == ("failed", True)
    assert time.monotonic() - started < 10


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert doctor._port("x", taken.getsockname()[1]).status == "warning"


def test_weights_and_devices_that_are_not_here_are_said(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = answers(Subject(subject.storage, "p", None, "cuda", BackboneSection(name="/none.py"), {}))
    assert (found["devices"].status, found["backbone"].status) == ("failed", "failed")
    wrong = BackboneSection(name="ViT-B-16", pretrained="opnai")
    assert answers(Subject(subject.storage, "p", None, "auto", wrong, {}))["backbone"].status == "failed"


def test_the_command_reads_the_configuration_and_has_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    arguments = ["doctor", "--storage", str(tmp_path / "s")]
    assert run(None, [*arguments, "--json"]) == 0
    assert {check["status"] for check in json.loads(capsys.readouterr().out)} <= {"ok", "warning"}
    Path("c.yaml").write_text(
        "run: {name: r}\ntasks: [{data: x}]\nbackbone: {name: none.py}\ntelemetry: {port: 9123}\n"
    )
    assert run(None, [*arguments, "--config", "c.yaml"]) == 1
    said = capsys.readouterr().out
    assert "failed  backbone: there is no none.py: set backbone.name to where it is." in said
    assert "9123" in said
    assert os.listdir(tmp_path) == ["c.yaml"]
    config = load("c.yaml")
    assert Subject.of(config, "s", "p", "local").address is None
    assert Subject.of(config, "s", "p", "10.0.0.1:6379").address == "10.0.0.1:6379"
