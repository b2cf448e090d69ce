"""Strangers attack the front with real sockets; what stands behind it is a server of a few lines."""

from __future__ import annotations

import asyncio
import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
import requests
from starlette.types import Receive, Scope, Send

from diki_ray.errors import ConfigError
from diki_ray.serving.doors import Door, Doors
from diki_ray.serving.front import front, listen
from diki_ray.serving.guard import say
from diki_ray.serving.settings import Limits, token_digest

TOKEN = "a-token-of-these-tests-0123456789"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
MAX_CONNECTIONS = 32
MAX_BODY_BYTES = 100_000


class Behind(BaseHTTPRequestHandler):
    """What a replica would be, but that it only repeats what it got."""

    protocol_version = "HTTP/1.1"
    healthy = True
    asked: ClassVar[list[tuple[str, dict[str, str]]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200 if self.healthy or self.path != "/-/healthz" else 503)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setenv("DIKI_SERVE_TOKEN", TOKEN)
    monkeypatch.setattr(Behind, "healthy", True)
    Behind.asked.clear()
    limits = Limits(
        token_sha256=token_digest(None, no_token=False),
        request_timeout_s=1.5,
        header_timeout_s=1.0,
        max_connections=MAX_CONNECTIONS,
        max_body_bytes=MAX_BODY_BYTES,
        max_buffered_bytes=3 * MAX_BODY_BYTES,
    )
    behind = ThreadingHTTPServer(("127.0.0.1", 0), Behind)
    threading.Thread(target=behind.serve_forever, daemon=True).start()
    with listen("127.0.0.1", 0) as listener, front(listener, f"http://127.0.0.1:{behind.server_port}", limits):
        yield listener.getsockname()[1]
    behind.shutdown()
    behind.server_close()


def connect(port: int, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(data)
    return connection


def answered(port: int) -> None:
    """Health and an honest request are answered now."""
    started = time.monotonic()
    assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5).json() == {"status": "ok"}
    assert requests.post(f"http://127.0.0.1:{port}/predict", b"x", headers=RIGHT, timeout=5).text == "x"
    assert time.monotonic() - started < 2


def seconds_until_closed(connection: socket.socket) -> float:
    started = time.monotonic()
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - started


def test_an_endless_head_is_cut_off_and_takes_no_memory(port: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    connection = connect(port, b"GET / HTTP/1.1\r\nHost: x\r\n")
    sent = 0
    try:
        while sent < 200 * 2**20:
            connection.sendall(b"A" * 65536)
            sent += 65536
    except ConnectionError:
        pass
    assert sent < 16 * 2**20  # what the kernel's buffers take
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024
    for line in (b"A" * 20_000 + b": 1\r\n", b"X: " + b"y" * 20_000 + b"\r\n", b"a: b\r\n" * 4000):
        reply = connect(port, b"GET / HTTP/1.1\r\nHost: x\r\n" + line).recv(100)
        assert reply.startswith(b"HTTP/1.1 400 "), reply
    answered(port)


def test_a_slow_head_is_closed_in_time_also_on_a_connection_that_was_used(port: int) -> None:
    used = connect(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert used.recv(65536).startswith(b"HTTP/1.1 200 ")
    for connection in (connect(port), connect(port, b"GET / HT"), used):
        stop = threading.Event()

        def drip(connection: socket.socket = connection, stop: threading.Event = stop) -> None:
            while not stop.wait(0.2):
                try:
                    connection.send(b"a")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        assert seconds_until_closed(connection) < 2.5
        stop.set()
        thread.join()
    answered(port)


def test_half_open_connections_keep_nobody_out(port: int) -> None:
    """Four times as many as may be, with a little of a head each: whoever comes gets in at once."""
    held = [connect(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n") for _ in range(4 * MAX_CONNECTIONS)]
    answered(port)
    assert sum(seconds_until_closed(connection) < 0.2 for connection in held) > 2 * MAX_CONNECTIONS


def test_without_the_token_no_body_is_read_and_nothing_reaches_what_is_behind(port: int) -> None:
    slow = [
        connect(port, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\nx")
        for _ in range(MAX_CONNECTIONS)
    ]
    for connection in slow:
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")
    answered(port)
    for path in ("/predict", "/tasks", "/metrics", "/openapi.json", "/-/routes", "/%2D/routes", "//", "/no"):
        assert requests.get(f"http://127.0.0.1:{port}{path}", timeout=5).status_code == 401
    assert {path for path, _ in Behind.asked} <= {"/predict", "/-/healthz"}


def test_slow_bodies_with_the_token_end_in_time_and_health_goes_on(port: int) -> None:
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 90000\r\n\r\nx"
    slow = [connect(port, head.encode()) for _ in range(MAX_CONNECTIONS - 4)]
    for _ in range(3):
        assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5).status_code == 200
        time.sleep(0.2)
    statuses = [connection.recv(65536)[9:12] for connection in slow]
    assert statuses.count(b"408") == MAX_CONNECTIONS // 2
    assert statuses.count(b"503") == len(slow) - MAX_CONNECTIONS // 2
    answered(port)


def test_bodies_together_take_no_more_memory_than_they_may(port: int) -> None:
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 99999\r\n\r\n"
    held = [connect(port, head.encode() + b"x" * 99_000) for _ in range(6)]
    assert [connection.recv(65536)[9:12] for connection in held].count(b"503") >= 3
    answered(port)


def test_a_body_that_is_too_large_is_said_to_be(port: int) -> None:
    url = f"http://127.0.0.1:{port}/predict"
    assert requests.post(url, b"x" * (MAX_BODY_BYTES + 1), headers=RIGHT, timeout=5).status_code == 413
    chunks = (b"x" * 1000 for _ in range(400))
    assert requests.post(url, chunks, headers=RIGHT, timeout=5).status_code == 413
    answered(port)


def test_what_is_passed_on_is_chosen(port: int) -> None:
    """Ray Serve's proxy takes its timeouts from headers, and has paths of its own."""
    headers = RIGHT | {"X-Request-Timeout-Seconds": "-1", "X-Request-Disconnect-Disabled": "?1", "Content-Type": "a/b"}
    assert requests.post(f"http://127.0.0.1:{port}/predict?q=%20", b"x", headers=headers, timeout=5).text == "x"
    path, passed = Behind.asked[-1]
    assert path == "/predict?q=%20"
    assert passed["content-type"] == "a/b"
    assert not {name for name in passed if name.startswith("x-")}
    for path in ("/-/routes", "/%2D/routes"):
        assert requests.get(f"http://127.0.0.1:{port}{path}", headers=RIGHT, timeout=5).status_code == 404
    absolute = f"GET http://127.0.0.1:1/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    assert connect(port, absolute.encode()).recv(100).startswith(b"HTTP/1.1 404 ")


def test_health_is_that_of_what_is_behind(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert requests.get(f"http://127.0.0.1:{port}/-/healthz", timeout=5).status_code == 200
    monkeypatch.setattr(Behind, "healthy", False)
    time.sleep(0.6)
    assert requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5).status_code == 503


def test_the_fronts_own_metrics_come_with_the_replicas(port: int) -> None:
    requests.get(f"http://127.0.0.1:{port}/tasks", timeout=5)
    text = requests.get(f"http://127.0.0.1:{port}/metrics", headers=RIGHT, timeout=5).text
    assert 'diki_serve_front_requests_total{status="401"} 1.0' in text


def test_a_port_that_is_taken_is_said_to_be(port: int) -> None:
    with pytest.raises(ConfigError, match=f"on 127.0.0.1:{port}"):
        listen("127.0.0.1", port)


def test_no_part_of_an_answer_waits_for_the_one_before_it_to_arrive() -> None:
    """Without TCP_NODELAY an answer's body is sent when its head was acknowledged, which takes up to 40 ms."""

    async def nodelay(listener: socket.socket) -> int:
        accepted: asyncio.Queue[socket.socket] = asyncio.Queue()
        server = await asyncio.start_server(
            lambda _, writer: accepted.put(writer.get_extra_info("socket")), sock=listener
        )
        async with server:
            _, writer = await asyncio.open_connection(*listener.getsockname())
            option = (await accepted.get()).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
        return option

    with listen("127.0.0.1", 0) as listener:
        assert asyncio.run(nodelay(listener)) == 1


def test_a_replicas_door_answers_and_when_it_is_gone_ray_serves_proxy_does(port: int) -> None:
    async def replica(scope: Scope, receive: Receive, send: Send) -> None:
        await say(send, 200, {"from": "the door"})

    door, doors = Door(replica, max_requests=1), Doors()
    doors.set([door.port])
    with listen("127.0.0.1", 0) as listener, front(listener, f"http://127.0.0.1:{port}", Limits(), doors):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert requests.post(f"{url}/predict", b"x", timeout=5).json() == {"from": "the door"}
        assert requests.get(f"{url}/metrics", headers=RIGHT, timeout=5).status_code == 200  # of all replicas
        door.close()
        deadline = time.monotonic() + 10
        while (answer := requests.post(f"{url}/predict", b"x", headers=RIGHT, timeout=5).text) != "x":
            assert answer == '{"from": "the door"}'  # it ends in its own time
            assert time.monotonic() < deadline
        with doors.least_busy() as left:
            assert left is None


def test_a_door_lets_so_many_in_and_the_least_busy_one_is_asked() -> None:
    inside, go_on = threading.Event(), threading.Event()

    async def replica(scope: Scope, receive: Receive, send: Send) -> None:
        inside.set()
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        await say(send, 200, {})

    door = Door(replica, max_requests=1)
    url = f"http://127.0.0.1:{door.port}"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(requests.get, url, timeout=10)
        assert inside.wait(10)
        assert requests.get(url, timeout=10).status_code == 503
        go_on.set()
        assert first.result().status_code == 200
    door.close()
    doors = Doors()
    doors.set([1, 2])
    with doors.least_busy() as one, doors.least_busy() as other:
        assert [one, other] == ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    for turn in ("http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:1"):  # equals take turns
        with doors.least_busy() as asked:
            assert asked == turn
    with doors.least_busy(), doors.least_busy():
        doors.set([2])  # the other's replica is gone
    with doors.least_busy() as left:
        assert left == "http://127.0.0.1:2"
