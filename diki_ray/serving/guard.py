"""Every request passes this before any of it is looked at: its token is asked for, its body measured, it is timed.

It is plain ASGI, outside of the framework: a refused request's body is not read.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diki_ray.serving.settings import Limits

OPEN = ("/", "/healthz")
"""These paths ask for no token: they are a page without any data, and a word."""

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class BodyTooLarge(Exception):
    """More bytes came than `max_body_bytes`. It is raised where the app reads them, and the app answers it."""


def too_large(settings: Limits) -> tuple[int, str]:
    """Returns the status and sentence of a request whose body is too large."""
    return 413, f"the body is too large: at most {settings.max_body_bytes} bytes."


class Guard:
    """Wraps an app. `observe(route, status, seconds)` hears of every request; other paths than `routes` are `other`."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Limits,
        routes: Collection[str],
        observe: Callable[[str, int, float], None],
    ) -> None:
        self._app = app
        self._settings = settings
        self._routes = frozenset(routes)
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:  # websockets: there are none
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        status = 500

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        try:
            refused = self._refused(scope, path)
            if refused is not None:
                await say(observed, refused[0], {"error": refused[1]})
            else:
                await self._app(scope, self._limited(receive), observed)
        finally:
            route = path if path in self._routes else "other"
            self._observe(route, status, time.monotonic() - started)

    def _refused(self, scope: Scope, path: str) -> tuple[int, str] | None:
        headers = scope["headers"]
        if self._settings.token_sha256 is not None and path not in OPEN:
            given = [value for name, value in headers if name == b"authorization"]
            if len(given) != 1 or not self._is_token(given[0]):
                return 401, "give the server's token: Authorization: Bearer …"
        for name, value in headers:
            # A length that is no number is left to the HTTP server, and what comes is counted in any case.
            if name == b"content-length" and value.isdigit() and int(value[:20]) > self._settings.max_body_bytes:
                return too_large(self._settings)
        return None

    def _is_token(self, authorization: bytes) -> bool:
        scheme, _, token = authorization.partition(b" ")
        digest = hashlib.sha256(token.strip()).hexdigest()
        return scheme.lower() == b"bearer" and hmac.compare_digest(digest, self._settings.token_sha256 or "")

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._settings.max_body_bytes:
                raise BodyTooLarge
            return message

        return limited


async def say(send: Callable[[Message], Awaitable[None]], status: int, fields: dict[str, str]) -> None:
    """Sends a whole response, with the fields as JSON."""
    body = json.dumps(fields).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
