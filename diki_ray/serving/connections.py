"""The connections of a front: their number, their heads and their time are bounded, which uvicorn leaves to others."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from uvicorn.protocols.http.h11_impl import H11Protocol

from diki_ray.serving.settings import Limits

UPSTREAM_GRACE_S = 10.0
"""The replicas' own limit comes so much earlier, and they can say why."""


class Connections:
    """Knows which connections wait for a request's head, the longest first, and has a place for one more always."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.registry = CollectorRegistry()
        self.closed = Counter(
            "diki_serve_front_closed", "Connections closed by their limits.", ["reason"], registry=self.registry
        )
        self._waiting: dict[Bounded, None] = {}

    def wait(self, connection: Bounded) -> None:
        self._waiting.pop(connection, None)
        self._waiting[connection] = None

    def leave(self, connection: Bounded) -> None:
        self._waiting.pop(connection, None)

    def make_room(self, number: int) -> None:
        """Closes the connection that has waited longest if there are more than may be. At most half of all send bodies
        or are answered (Front), so there is one that waits, and an honest one gets in whoever holds the others."""
        if number > self.limits.max_connections and self._waiting:
            next(iter(self._waiting)).cut("too many connections")


class Bounded(H11Protocol):
    """One connection, which is cut when a request's head, or the request as a whole, takes longer than it may."""

    def __init__(self, *arguments: Any, connections: Connections, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._bounds = connections
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()
        self._bounds.make_room(len(self.connections))

    def data_received(self, data: bytes) -> None:
        former = self.cycle
        super().data_received(data)
        if self.cycle is not former and not self.cycle.response_complete:
            self._work()

    def on_response_complete(self) -> None:
        former = self.cycle
        super().on_response_complete()
        if self.cycle is former:
            self._wait()
        else:  # the next request was here already
            self._work()

    def connection_lost(self, exc: Exception | None) -> None:
        self._bounds.leave(self)
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def cut(self, reason: str) -> None:
        """Closes the connection at once: whoever does not read would keep an orderly end waiting."""
        self._bounds.leave(self)
        self._bounds.closed.labels(reason).inc()
        self.transport.abort()

    def _wait(self) -> None:
        self._bounds.wait(self)
        self._within(self._bounds.limits.header_timeout_s, "slow head")

    def _work(self) -> None:
        self._bounds.leave(self)
        self._within(2 * self._bounds.limits.request_timeout_s + UPSTREAM_GRACE_S, "slow request")

    def _within(self, seconds: float, reason: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self.cut, reason)
