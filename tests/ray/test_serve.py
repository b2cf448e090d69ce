"""jobs/serve.py as people start it, over real HTTP: a task committed while requests run, the token, the end."""

from __future__ import annotations

import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from stored_run import TOKEN, StoredRun, as_json, picture, picture_file

from diki_ray.prediction.run_predictor import Answer, load_predictor

pytestmark = pytest.mark.cluster

JOB = Path(__file__).parent.parent.parent / "jobs" / "serve.py"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
IMAGES = [(task, seed) for seed in (300, 301) for task in ("warm", "cold", "lush")]
CLIENTS = 6


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, str(JOB), "--run", "colours", *arguments],
        env=environment | {"DIKI_SERVE_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Server:
    run: StoredRun
    process: subprocess.Popen[str]
    url: str

    def predict(self, body: Any, session: Any = requests) -> requests.Response:
        return session.post(f"{self.url}/predict", json=body, headers=RIGHT, timeout=60)

    def get(self, path: str, headers: dict[str, str] = RIGHT) -> requests.Response:
        return requests.get(self.url + path, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    run = StoredRun(tmp_path_factory.mktemp("run"), "warm", "cold")
    where = ("--storage", run.storage, "--backbone", run.config.backbone.name)
    process = start(*where, "--port", str(free_port()), "--refresh-s", "0.2")
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"serving run 'colours' at (http://127\.0\.0\.1:\d+)\n", line)
    assert found, line + process.communicate()[1]
    yield Server(run, process, found[1])
    process.kill()
    process.communicate()


def expected(run: StoredRun) -> dict[tuple[str, int], Answer]:
    answers = load_predictor(run.storage, "colours", run.config).answer(picture(*image) for image in IMAGES)
    return dict(zip(IMAGES, answers, strict=True))


def test_a_task_committed_while_requests_run_is_served_and_no_answer_is_wrong(server: Server) -> None:
    """Every client asks for its own image and checks each answer against those of the version that it names."""
    right = {server.run.store.version: expected(server.run)}
    told: list[tuple[tuple[str, int], int, dict[str, Any]]] = []
    stop = threading.Event()

    def ask(image: tuple[str, int]) -> None:
        body = as_json(picture_file(*image))
        with requests.Session() as session:
            while not stop.is_set():
                response = server.predict(body, session)
                assert response.status_code == 200, response.text
                (answer,) = response.json()["answers"]
                told.append((image, response.json()["version"], answer))

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(ask, image) for image in IMAGES]
        try:
            time.sleep(1.5)
            version = server.run.learn("lush")
            right[version] = expected(server.run)
            deadline = time.monotonic() + 60
            while {image for image, told_version, _ in list(told) if told_version == version} != set(IMAGES):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert server.get("/tasks").json()["version"] == version
        finally:
            stop.set()
        for client in clients:
            client.result()

    assert {version for _, version, _ in told} == set(right)
    for image, version, answer in told:
        known = right[version][image]
        assert (answer["class_name"], answer["task"]) == (known.class_name, known.task), (image, version)
        assert answer["confidence"] == pytest.approx(known.confidence, abs=2e-3)
        assert answer["log_densities"] == pytest.approx(dict(known.log_densities), rel=1e-4)
    assert {image for image, version, _ in told if version == max(right)} == set(IMAGES)
    assert right[max(right)][("lush", 300)].task == "lush"


def test_metrics_tell_that_requests_shared_passes(server: Server) -> None:
    with ThreadPoolExecutor(CLIENTS) as pool:
        done = list(pool.map(lambda image: server.predict(as_json(picture_file(*image))), IMAGES * 4))
    assert {response.status_code for response in done} == {200}
    text = server.get("/metrics").text
    total = {
        name: float(value) for name, value in re.findall(r"^(diki_serve_batch_images_\w+)\{.*\} (\S+)$", text, re.M)
    }
    assert total["diki_serve_batch_images_sum"] > total["diki_serve_batch_images_count"] > 0
    assert TOKEN not in text


def test_strangers_are_refused_over_http_too(server: Server) -> None:
    image = as_json(picture_file("warm", 1))
    for headers in ({}, {"Authorization": "Bearer wrong-token-of-these-tests"}):
        assert requests.post(f"{server.url}/predict", json=image, headers=headers, timeout=60).status_code == 401
        assert server.get("/tasks", headers).status_code == 401
        assert server.get("/healthz", headers).json() == {"status": "ok"}
    assert server.predict({"images": ["***"]}).status_code == 422
    assert server.predict({"images": ["A" * (17 * 2**20)]}).status_code == 413
    assert server.get("/no/such/route").status_code == 404
    assert server.predict(image).status_code == 200


def test_a_replica_whose_model_is_killed_is_replaced(server: Server) -> None:
    def model() -> psutil.Process:
        (found,) = (
            child
            for child in psutil.Process(server.process.pid).children(recursive=True)
            if "diki_ray.serving.model_process" in child.cmdline()
        )
        return found

    killed, image = model(), as_json(picture_file("warm", 1))
    right = server.predict(image).json()
    killed.kill()
    told = set[int]()
    until = time.monotonic() + 90
    while (response := server.predict(image)).status_code != 200:
        assert time.monotonic() < until, told
        told.add(response.status_code)
        time.sleep(0.2)
    assert told <= {502, 503, 504}
    assert response.json() == right
    assert model().pid != killed.pid


def test_the_job_says_what_is_wrong_in_one_sentence(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(JOB))["main"]
    monkeypatch.delenv("DIKI_SERVE_TOKEN", raising=False)
    port = server.url.rpartition(":")[2]
    told = ("--backbone", server.run.config.backbone.name)
    for arguments, said in (
        (("--storage", server.run.storage), "a server needs a token"),
        (("--storage", str(tmp_path), "--no-token"), "has no run 'colours'"),
        (("--storage", server.run.storage, *told, "--no-token", "--port", port), f"on 127.0.0.1:{port}"),
        (("--storage", server.run.storage, "--no-token", "--max-images", "0"), "max_images: "),
    ):
        monkeypatch.setattr(sys, "argv", ["serve.py", "--run", "colours", *arguments])
        assert main() == 2
        output, errors = capsys.readouterr()
        assert output == ""
        assert errors.startswith("error: ")
        assert said in errors
        assert len(errors.splitlines()) == 1


def test_it_ends_at_sigterm_and_leaves_the_port_free(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 128 + signal.SIGTERM
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that just ended do not count
        probe.bind(("127.0.0.1", int(server.url.rpartition(":")[2])))
