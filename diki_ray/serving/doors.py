"""A replica has a door of its own on loopback: requests come straight to its application, and not through Ray Serve's
proxy, its router and an actor call, which together take several times as long as an answer of a small model.

Ray Serve still starts, watches and replaces replicas, and its proxy answers whatever no door does: requests of a server
whose replicas are on other nodes, or whose replica has just died.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from diki_ray.serving.guard import say

_HOST = "127.0.0.1"
_START_S = 10.0


class Door:
    """Answers HTTP on a free port of loopback, in a thread of its own; more than `max_requests` at once get 503."""

    def __init__(self, app: ASGIApp, max_requests: int) -> None:
        self._app, self._max_requests, self._at_work = app, max_requests, 0
        listener = socket.socket(proto=socket.IPPROTO_TCP)  # as in front.listen
        listener.bind((_HOST, 0))
        self.port = int(listener.getsockname()[1])
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._limited,
                interface="asgi3",
                lifespan="off",
                ws="none",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=600,  # the front's connections: it closes them itself
            )
        )
        threading.Thread(target=self._server.run, args=([listener],), name="diki-serve-door", daemon=True).start()
        deadline = time.monotonic() + _START_S
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self) -> None:
        self._server.should_exit = True

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._at_work >= self._max_requests:
            await say(send, 503, {"error": "too many requests are under way: try again in a second."})
            return
        self._at_work += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._at_work -= 1


class Doors:
    """Knows the doors of all replicas, by URL, and how many requests each has; Ray Serve's proxy answers without."""

    def __init__(self) -> None:
        self._at_work: dict[str, int] = {}

    def set(self, ports: Collection[int]) -> None:
        """From now on these are the doors; any thread may say so."""
        self._at_work = {url: self._at_work.get(url, 0) for url in (f"http://{_HOST}:{port}" for port in ports)}

    def shut(self, door: str) -> None:
        """Use this one no more, until it is set again."""
        self._at_work = {url: number for url, number in self._at_work.items() if url != door}

    @contextmanager
    def least_busy(self) -> Iterator[str | None]:
        """Yields the door with the fewest requests, for one more; of equals the one that was asked longest ago. None:
        there is none."""
        counts = self._at_work
        door = min(counts, key=counts.__getitem__, default=None)
        if door is None:
            yield None
            return
        counts[door] = counts.pop(door) + 1  # it is the last of equals now
        try:
            yield door
        finally:
            if door in self._at_work:
                self._at_work[door] = max(0, self._at_work[door] - 1)
