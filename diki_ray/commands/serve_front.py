"""`diki-ray serve-front`: the front of a RayService's pods, which `diki-ray serve` has of its own."""

from __future__ import annotations

from typing import Any

from diki_ray.serving.front import listen, server_of
from diki_ray.serving.settings import parse_limits, token_digest


def main(host: str, port: int, upstream: str, token_file: str | None, no_token: bool, limits: dict[str, Any]) -> int:
    """Serve until SIGTERM; the exit code. limits: fields of `Limits`."""
    checked = parse_limits(token_sha256=token_digest(token_file, no_token), **limits)
    with listen(host, port) as listener:
        server_of(upstream, checked).run([listener])
    return 0
