"""What strangers meet first: a server that bounds headers, bodies, connections and time, and asks for the token.

Ray Serve's own proxy bounds none of these (2.60: endless headers fill its memory, half-open requests take all its
descriptors). It listens on loopback alone, and this one passes to it what is whole. The server is uvicorn with h11, the
parser that bounds a request's head; the connections' number and their time are bounded here.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import aiohttp
import uvicorn
from prometheus_client import Counter, generate_latest
from starlette.types import Receive, Scope, Send
from yarl import URL

from diki_ray.errors import ConfigError
from diki_ray.serving.connections import UPSTREAM_GRACE_S, Bounded, Connections
from diki_ray.serving.doors import Doors
from diki_ray.serving.guard import BodyTooLarge, Guard, say, too_large
from diki_ray.serving.settings import Limits

HEALTH = ("/healthz", "/-/healthz")
"""The second is the name by which KubeRay asks Ray Serve's proxy."""

_HEALTH_TIMEOUT_S = 2.0
_ASKED = ("accept", "authorization", "content-type")
"""Headers that are passed on; among the others are Ray Serve's own, which would change its timeouts."""
_ANSWERED = ("allow", "content-security-policy", "content-type", "retry-after", "www-authenticate")


class Front:
    """The application of this server: it answers for its health, and passes on whole requests that have the token."""

    def __init__(self, upstream: str, limits: Limits, connections: Connections, doors: Doors | None = None) -> None:
        self._upstream = upstream
        self._doors = doors or Doors()
        self._limits = limits
        self._registry = connections.registry
        self._requests = Counter(
            "diki_serve_front_requests", "Requests by their status.", ["status"], registry=self._registry
        )
        self._guarded = Guard(self._pass_on, limits, (), self._observe)
        self._at_work = 0
        self._buffered_bytes = 0
        self._health = (0.0, False)
        self._session: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http" and scope["path"] in HEALTH:
            await self._say_health(send)
        else:
            await self._guarded(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._limits.max_connections), auto_decompress=False
        )
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._session.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _say_health(self, send: Send) -> None:
        """Answers with what Ray Serve's proxy says of itself, which no request's queue can delay."""
        asked, healthy = self._health
        if time.monotonic() - asked > 0.5:
            try:
                timeout = aiohttp.ClientTimeout(total=_HEALTH_TIMEOUT_S)
                async with self._session.get(f"{self._upstream}/-/healthz", timeout=timeout) as reply:
                    healthy = reply.status == 200
            except (aiohttp.ClientError, TimeoutError):
                healthy = False
            self._health = (time.monotonic(), healthy)
        if healthy:
            await say(send, 200, {"status": "ok"})
        else:
            await say(send, 503, {"error": "no replica answers at present."})

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["raw_path"].startswith(b"/") or scope["path"].startswith("/-/"):
            await say(send, 404, {"error": "Not Found"})
        elif self._at_work >= self._limits.max_connections // 2:
            await say(send, 503, {"error": "too many requests are under way: try again in a second."})
        else:
            self._at_work += 1
            parts: list[bytes] = []
            try:
                await self._with_body(parts, scope, receive, send)
            finally:
                self._at_work -= 1
                self._buffered_bytes -= sum(map(len, parts))

    async def _with_body(self, parts: list[bytes], scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._limits.request_timeout_s):
                whole = await self._read(parts, receive)
        except BodyTooLarge:
            status, sentence = too_large(self._limits)
            await say(send, status, {"error": sentence})
        except TimeoutError:
            await say(send, 408, {"error": f"the body did not come within {self._limits.request_timeout_s:g} s."})
        else:
            if whole is None:
                await say(send, 503, {"error": "too many bodies are under way: try again in a second."})
            elif whole:
                await self._forward(b"".join(parts), scope, send)

    async def _read(self, parts: list[bytes], receive: Receive) -> bool | None:
        """Returns whether the body came to its end; None where all bodies together would take too much memory."""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            part = message.get("body", b"")
            if self._buffered_bytes + len(part) > self._limits.max_buffered_bytes:
                return None
            if part:
                parts.append(part)
                self._buffered_bytes += len(part)
            if not message.get("more_body", False):
                return True

    async def _forward(self, body: bytes, scope: Scope, send: Send) -> None:
        """Passes a request to a replica's door, and to Ray Serve's proxy where no door answers. Asking twice changes
        nothing. Metrics are of all replicas, so the proxy is asked for them."""
        with self._doors.least_busy() as door:
            if door is not None and scope["path"] != "/metrics":
                try:
                    await self._ask(door, body, scope, send)
                    return
                except aiohttp.ClientError:
                    self._doors.shut(door)
        try:
            await self._ask(self._upstream, body, scope, send)
        except (aiohttp.ClientError, ValueError):
            await say(send, 502, {"error": "no replica can be reached: try again in a second."})

    async def _ask(self, upstream: str, body: bytes, scope: Scope, send: Send) -> None:
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        url = URL(upstream + (scope["raw_path"] + query).decode("latin-1"), encoded=True)
        headers = [(n.decode(), v.decode("latin-1")) for n, v in scope["headers"] if n.decode("latin-1") in _ASKED]
        timeout = aiohttp.ClientTimeout(total=self._limits.request_timeout_s + UPSTREAM_GRACE_S)
        try:
            async with self._session.request(
                scope["method"], url, data=body or None, headers=headers, timeout=timeout, allow_redirects=False
            ) as reply:
                content = await reply.read()
        except TimeoutError:
            await say(send, 504, {"error": f"there was no answer within {self._limits.request_timeout_s:g} s."})
        else:
            if scope["path"] == "/metrics" and reply.status == 200:
                content += generate_latest(self._registry)
            kept = [(n.lower().encode(), v.encode()) for n, v in reply.headers.items() if n.lower() in _ANSWERED]
            length = (b"content-length", str(len(content)).encode())
            await send({"type": "http.response.start", "status": reply.status, "headers": [*kept, length]})
            await send({"type": "http.response.body", "body": content})

    def _observe(self, _route: str, status: int, _seconds: float) -> None:
        self._requests.labels(str(status)).inc()


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket on which a front can listen. Raises ConfigError where the port cannot be had."""
    # asyncio turns Nagle's algorithm off only where the protocol is named: else a body waits 40 ms for its head's ACK.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, proto=socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1)  # now it is seen by others that it is taken
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"nothing can be served on {host}:{port} ({error.strerror}): choose another host or port."
        ) from error
    return listener


def server_of(upstream: str, limits: Limits, doors: Doors | None = None) -> uvicorn.Server:
    """Returns the server of a front that passes requests on to the doors, else to `upstream`, as in
    http://127.0.0.1:8001."""
    connections = Connections(limits)
    protocol: Any = partial(Bounded, connections=connections)  # uvicorn calls it as it would a class
    return uvicorn.Server(
        uvicorn.Config(
            Front(upstream, limits, connections, doors),
            http=protocol,
            ws="none",
            lifespan="on",
            loop="asyncio",
            h11_max_incomplete_event_size=limits.max_header_bytes,
            timeout_keep_alive=max(1, int(limits.header_timeout_s)),
            timeout_graceful_shutdown=2,
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=limits.max_connections,
        )
    )


@contextmanager
def front(listener: socket.socket, upstream: str, limits: Limits, doors: Doors | None = None) -> Iterator[None]:
    """Answers on the listener in a thread of its own while in the block."""
    server = server_of(upstream, limits, doors)
    thread = threading.Thread(target=server.run, args=([listener],), name="diki-serve-front", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.02)
        yield
    finally:
        server.should_exit = True
        thread.join(5)
        listener.close()
