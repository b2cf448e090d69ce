"""A server has settings, and a token that it asks for. Settings are plain values that travel in Ray Serve's own state,
so the token itself is not among them, only its sha256."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from diki_ray.config import sentences
from diki_ray.config.run import Section
from diki_ray.errors import ConfigError

TOKEN_VARIABLE = "DIKI_SERVE_TOKEN"
MIN_TOKEN_LENGTH = 16


class Limits(Section):
    """They say who gets in, and how much of a connection there may be before a replica hears of it."""

    token_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the bearer token. None: everybody is answered."""

    request_timeout_s: float = Field(default=30.0, gt=0)
    """Longest time from a request's head to the end of its body; after it the request gets 408. From there it may take
    as long again to its answer; after it the request gets 504."""
    max_body_bytes: int = Field(default=16 * 2**20, ge=1)
    max_buffered_bytes: int = Field(default=256 * 2**20, ge=1)
    """Most bytes that the bodies of all requests under way may have together. A request beyond it gets 503."""
    header_timeout_s: float = Field(default=10.0, gt=0)
    """A connection that has not sent a whole request head in this time is closed."""
    max_header_bytes: int = Field(default=16 * 2**10, ge=1024)
    max_connections: int = Field(default=512, ge=8)
    """Beyond this number the connection that has waited longest for a request's head is closed. Half of the connections
    may have requests under way. Together with the connections to the replicas, the default stays within the usual limit
    of 1024 descriptors for a process."""


class Settings(Limits):
    """They say which run is served, and how much of anything one request may ask for."""

    storage: str = "storage"
    """An absolute path, or s3://, gs://, az://: replicas run in folders of their own."""
    run: str
    backbone: str | None = None
    """Instead of the stored configuration's. A Python file or a folder is taken from here alone, by an absolute path:
    stored data runs no code."""
    pretrained: str | None = None
    """With `backbone`: open_clip's tag of its weights, or a file of them."""
    directory: str | None = None
    """With `backbone`: as in the configuration."""

    refresh_s: float = Field(default=2.0, gt=0)
    """Seconds between two looks at the run's log."""
    text_grid: int = Field(default=33, ge=2)
    """Weights at which class features are computed; between them they are interpolated."""
    learnt_cache_bytes: int = Field(default=512 * 2**20, ge=1)
    """Class features of the classes learnt that a replica keeps."""
    named_cache_bytes: int = Field(default=64 * 2**20, ge=1)
    """Class features of the classes that requests name. They are kept apart, so that no request can evict those of the
    classes learnt."""

    max_batch_size: int = Field(default=32, ge=1)
    """Most images in one pass, whatever requests and tasks they belong to."""
    batch_wait_s: float = Field(default=0.05, ge=0)
    """How long a pass waits at most until as many images wait for it as are still on their way."""
    max_waiting_images: int = Field(default=256, ge=1)
    """Images that wait for a pass in a replica; beyond them requests get 503."""
    max_requests: int = Field(default=64, ge=1)
    """Requests a replica works on at once; as many wait in the proxy, further ones get 503."""
    decode_threads: int = Field(default=2, ge=1)
    """Threads that decode images, each in a process of its own."""
    decode_timeout_s: float = Field(default=5.0, gt=0)
    """Longest time to decode one image. After it the decoding process is ended and the request gets 422. An ordinary
    image of 16 million pixels took 0.52 s."""

    max_images: int = Field(default=32, ge=1)
    """Most images in one request."""
    max_pixels: int = Field(default=25_000_000, ge=1)
    """Most pixels of an image, checked before anything is decoded."""
    max_aspect_ratio: float = Field(default=30.0, ge=1)
    """Longer side by shorter side. CLIP scales the shorter side to the model's size, so a line of a million pixels,
    tiny as a file, would become an image of hundreds of millions."""
    max_classes: int = Field(default=200, ge=1)
    """Most classes that a request may name."""


def parse_settings(**fields: Any) -> Settings:
    """Raises ConfigError naming every field that is wrong, its value, and what is allowed."""
    try:
        return Settings(**fields)
    except ValidationError as error:
        raise ConfigError(f"settings: {sentences(error, Settings)}.") from None


def parse_limits(**fields: Any) -> Limits:
    """Raises ConfigError as parse_settings does."""
    try:
        return Limits(**fields)
    except ValidationError as error:
        raise ConfigError(f"settings: {sentences(error, Limits)}.") from None


def token_digest(token_file: str | None, no_token: bool) -> str | None:
    """Returns the sha256 of the token in a file, else in the environment; None only where `no_token` says so.

    Raises:
        ConfigError: no token, one that is too short or cannot be sent in a header, or both a token and `no_token`.
    """
    if no_token:
        if token_file is not None:
            raise ConfigError("--no-token and --token-file contradict each other: give one of them.")
        return None
    if token_file is not None:
        try:
            token = Path(token_file).expanduser().read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the token file {token_file} cannot be read ({error}).") from None
    else:
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
    where = token_file or TOKEN_VARIABLE
    if not token:
        raise ConfigError(
            f"a server needs a token: put one into {TOKEN_VARIABLE} or a file (--token-file), for example "
            "`openssl rand -hex 32`, or say --no-token to answer everybody."
        )
    if not re.fullmatch(r"[\x21-\x7e]+", token) or len(token) < MIN_TOKEN_LENGTH:
        raise ConfigError(
            f"the token of {where} is none: at least {MIN_TOKEN_LENGTH} printable ASCII characters without spaces."
        )
    return hashlib.sha256(token.encode()).hexdigest()
