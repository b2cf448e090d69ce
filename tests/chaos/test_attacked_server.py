"""Tasks are committed while strangers attack the server: it serves them, and each honest answer is one version's."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
import uvicorn
from stored_run import TOKEN, StoredRun, as_json, picture_file

from diki_ray.serving.app import Service, build_app
from diki_ray.serving.front import front, listen
from diki_ray.serving.model_process import ModelProcess
from diki_ray.serving.settings import Settings, token_digest

pytestmark = pytest.mark.long
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
TASKS = ("warm", "cold", "lush")


@pytest.fixture
def run(tmp_path: Path) -> StoredRun:
    return StoredRun(tmp_path, "warm")


@pytest.fixture
def port(run: StoredRun, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setenv("DIKI_SERVE_TOKEN", TOKEN)
    settings = Settings(
        storage=run.storage,
        run="colours",
        backbone=run.config.backbone.name,
        token_sha256=token_digest(None, no_token=False),
        refresh_s=0.2,
        max_body_bytes=200_000,
        header_timeout_s=2.0,
        request_timeout_s=5.0,
        max_connections=64,
    )
    service = Service(settings, ModelProcess(settings))
    with socket.socket() as behind:
        behind.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(build_app(service), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [behind]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        upstream = f"http://127.0.0.1:{behind.getsockname()[1]}"
        with listen("127.0.0.1", 0) as listener, front(listener, upstream, settings):
            yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()
    service.close()


def attacks(port: int) -> list[Callable[[], object]]:
    """Each of them once; they go on until the test is over."""
    url = f"http://127.0.0.1:{port}/predict"

    def half_open() -> None:
        with contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=5)) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 4000)
            time.sleep(0.5)

    def post(**what: object) -> None:
        requests.post(url, timeout=10, **what)  # type: ignore[arg-type]

    damaged = picture_file("warm", 1)[:-200]
    return [
        half_open,
        lambda: post(headers={"Authorization": "Bearer " + "x" * 30}, data=b"x" * 1000),
        lambda: post(headers=RIGHT, data=b"x" * 300_000),
        lambda: post(headers=RIGHT | {"Content-Type": "application/json"}, data=b"[" * 100_000),
        lambda: post(headers=RIGHT, json=as_json(damaged)),
        lambda: post(headers=RIGHT, files={"image": b"GIF89a" + bytes(5000)}),
        lambda: post(headers=RIGHT, json=as_json(picture_file("warm", 2), classes=["x"] * 5000)),
    ]


def test_tasks_committed_while_the_server_is_attacked_are_served(run: StoredRun, port: int) -> None:
    over = threading.Event()
    count = [0] * len(attacks(port))

    def attack_on_and_on(number: int, attack: Callable[[], object]) -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):  # refused and closed connections are what they are to get
                attack()
            count[number] += 1

    threads = [threading.Thread(target=attack_on_and_on, args=pair, daemon=True) for pair in enumerate(attacks(port))]
    for thread in threads:
        thread.start()
    answers: dict[int, set[str]] = {}
    versions = []
    for task in (None, "cold", "lush"):
        wanted = run.store.version if task is None else run.learn(task)
        until = time.monotonic() + 60
        while not versions or versions[-1] < wanted:
            assert time.monotonic() < until, f"{task} is not served; versions {versions}"
            asked = requests.post(
                f"http://127.0.0.1:{port}/predict", json=as_json(picture_file("warm", 7)), headers=RIGHT, timeout=10
            )
            assert asked.status_code in (200, 503), asked.text  # busy may be said, wrong may not
            if asked.status_code == 200:
                said = asked.json()
                versions.append(said["version"])
                answers.setdefault(said["version"], set()).add(json.dumps(said["answers"], sort_keys=True))
    over.set()
    for thread in threads:
        thread.join(20)
    assert min(count) > 0
    assert versions == sorted(versions)
    assert all(len(tasks) == 1 for tasks in answers.values()), "an answer mixed two versions"
    known = requests.get(f"http://127.0.0.1:{port}/tasks", headers=RIGHT, timeout=10).json()
    assert [task["name"] for task in known["tasks"]] == list(TASKS)
