"""Keeps a cluster that is started here for its user alone: it listens on loopback, and its token is private."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray._private import services

from diki_ray.errors import ConfigError

LOOPBACK = "127.0.0.1"


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
def on_loopback() -> Iterator[None]:
    """Ray, started in the block with LOOPBACK as its address, keeps that address: then its ports are on loopback alone.

    Otherwise Ray 2.60 puts an address that others can reach in its place, and listens on every interface. The function
    that does so is Ray's own; it is put back at the end of the block.
    """
    resolve = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = resolve
