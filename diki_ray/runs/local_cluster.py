"""Keeps a cluster that is started here for its user alone: it listens on loopback, and its token is private."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import NodeID
from ray._private import services
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # it is not in the stub

from diki_ray.errors import ConfigError

LOOPBACK = "127.0.0.1"
LOOKS_OFTEN = {"raylet_client_connect_timeout_milliseconds": 20, "raylet_client_num_connect_attempts": 500}
"""How often Ray's node looks for its object store, which a thread of it starts meanwhile. By itself (2.60) it does so
once a second, so that half of all starts take a second longer; for 10 s it looks either way."""
_NODE_S = 5.0
"""After so long without its node Ray looks by itself, once a second, and says what is wrong."""


def token_file() -> Path | None:
    """The file in which Ray looks for its token; None where it reads none."""
    if "RAY_AUTH_TOKEN" in os.environ or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def keep_token_private() -> None:
    """Makes the file of Ray's token, if it is missing, and sees that nobody but its user can read it.

    Ray itself would make it with the modes that the umask leaves, which is 0644 for most people.

    Raises:
        ConfigError: the file cannot be made or its mode cannot be changed.
    """
    if (path := token_file()) is None:
        return
    try:
        if not path.exists():
            _write_token(path)
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            path.chmod(0o600)
            print(
                f"{path}, the token of this user's Ray clusters, could be read by others (mode {mode:04o}); it is "
                "private now (0600). Where others use this machine, delete it: a new one is made.",
                file=sys.stderr,
            )
    except OSError as error:
        raise ConfigError(f"the token of Ray's clusters in {path} cannot be kept private ({error}).") from error


def _write_token(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))  # as Ray makes one
    try:
        os.link(part, path)  # whole or not at all; of two jobs that start at once the first makes it
    except FileExistsError:
        pass
    finally:
        part.unlink()


@contextmanager
def starting() -> Iterator[None]:
    """Ray, started in the block with LOOPBACK as its address, keeps that address: then its ports are on loopback alone.
    And it goes on as soon as its node is there.

    Otherwise Ray 2.60 puts an address that others can reach in its place, and listens on every interface; and it looks
    for its node once a second. The functions that do so are Ray's own; they are put back at the end of the block.
    """
    resolve, get_node = services.resolve_ip_for_localhost, services.get_node

    def wait_and_get(gcs_address: str, node_id: str) -> Any:
        client, until = GcsClient(address=gcs_address), time.monotonic() + _NODE_S
        while NodeID.from_hex(node_id) not in client.get_all_node_info() and time.monotonic() < until:
            time.sleep(0.02)
        return get_node(gcs_address, node_id)

    services.resolve_ip_for_localhost, services.get_node = lambda host: host, wait_and_get
    try:
        yield
    finally:
        services.resolve_ip_for_localhost, services.get_node = resolve, get_node
