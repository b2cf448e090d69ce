"""What a platform engineer asks of a machine before a run: each question is a check with a sentence for an answer.

Nothing is started. The only thing written is an object below `doctor/` in the storage, which is deleted again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import Literal
from urllib.request import Request, urlopen

import ray
import torch

from diki_ray.clip.weights import weights_file
from diki_ray.config import BackboneSection, Config
from diki_ray.errors import UserError
from diki_ray.runs.cluster import LOCAL, connected
from diki_ray.runs.local_cluster import token_file
from diki_ray.store.objects import Objects

GB = 10**9
LITTLE_SPACE_BYTES, NO_SPACE_BYTES = 5 * GB, GB // 2
LITTLE_SHARED_BYTES = 2 * GB
"""Ray keeps objects in shared memory, by default up to a third of the memory; containers often have 64 MB of it."""
MOST_SKEW_S = 5.0
"""A lease lives for 30 s after its last renewal, and is judged by others with their own clock."""
_RACERS = 8
_NETWORK_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Check:
    """An answer."""

    name: str
    status: Literal["ok", "warning", "failed"]
    told: str
    """A sentence: what was found, and what to do where it is not right."""


@dataclass(frozen=True)
class Subject:
    """What is asked about."""

    storage: str
    data_root: str
    address: str | None
    """The cluster at this address is joined; None: one is started on this machine."""
    device: str
    backbone: BackboneSection
    ports: dict[str, int]
    """What listens at each of them, by what it is known by."""

    @staticmethod
    def of(config: Config | None, storage: str, data_root: str, address: str | None) -> Subject:
        """What the options name, else a configuration, else the environment and the defaults."""
        ports = {"diki-ray serve (--port)": 8000}
        configured = None if config is None else config.cluster.address
        named = address or configured or os.environ.get("RAY_ADDRESS") or LOCAL
        address = None if named == LOCAL else named
        if config is None:
            return Subject(storage, data_root, address, "auto", BackboneSection(), ports)
        if config.telemetry.port is not None:
            ports["telemetry.port"] = config.telemetry.port
        return Subject(storage, config.data.root, address, config.train.device, config.backbone, ports)


def examine(subject: Subject) -> Iterator[Check]:
    """The checks, one after the other; some wait for a network."""
    yield Check("versions", "ok", f"diki-ray {version('diki-ray')}, Ray {ray.__version__}, torch {torch.__version__}.")
    yield _device(subject)
    yield from _storage(subject.storage)
    yield from (_space(what, place) for what, place in (("storage", subject.storage), ("data", subject.data_root)))
    yield _shared_memory()
    yield _token()
    yield _cluster(subject.address)
    yield _guarded("backbone", partial(_backbone, subject.backbone))
    yield from (_port(what, port) for what, port in subject.ports.items())


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except (UserError, OSError, ValueError) as error:
        return Check(name, "failed", str(error))


def _device(subject: Subject) -> Check:
    cpus = f"{os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} with {gpu.total_memory / GB:.0f} GB" for gpu in gpus)
        return Check("devices", "ok", f"{cpus}; {names}.")
    if subject.device != "cuda":
        return Check("devices", "ok", f"{cpus}; no GPU that torch sees, so train.device=auto is the CPU.")
    if subject.address is not None:
        return Check("devices", "ok", f"{cpus}; no GPU here, and train.device=cuda is for the cluster's.")
    return Check("devices", "failed", f"{cpus}; train.device=cuda and torch sees no GPU: set train.device=cpu.")


def _storage(place: str) -> Iterator[Check]:
    """Writes, reads and deletes; creates at once from several threads; and compares clocks."""
    existing = _existing_parent(place) if "://" not in place else None
    try:
        objects = Objects.open(place)
        yield _guarded("storage", partial(_written_and_deleted, objects))
        yield _guarded("conditional puts", partial(_conditional, objects))
        yield _guarded("clock", partial(_clock, objects))
    except UserError as error:
        yield Check("storage", "failed", str(error))
    finally:
        if existing is not None:
            _remove_empty(Path(place).expanduser().absolute() / "doctor", existing)


def _probe() -> str:
    return f"doctor/{uuid.uuid4().hex}"


def _written_and_deleted(objects: Objects) -> Check:
    path, data = _probe(), os.urandom(1024)
    started = time.monotonic()
    objects.put(path, data)
    same = objects.get(path) == data
    objects.delete([path])
    if not same or objects.exists(path):
        told = "does not give back what was written" if not same else "still has what was deleted"
        return Check("storage", "failed", f"{objects.uri} {told}: use a storage that is consistent.")
    taken = time.monotonic() - started
    return Check("storage", "ok", f"{objects.uri} can be written, read and deleted ({taken * 1000:.0f} ms).")


def _conditional(objects: Objects) -> Check:
    path = _probe()
    try:
        with ThreadPoolExecutor(_RACERS) as threads:
            made = sum(threads.map(lambda n: objects.put(path, b"%d" % n, create_only=True), range(_RACERS)))
    finally:
        objects.delete([path])
    if made == 1:
        return Check("conditional puts", "ok", f"of {_RACERS} writers that create one object at once, one succeeds.")
    return Check(
        "conditional puts",
        "failed",
        f"{made} of {_RACERS} writers created the same object, so two drivers could overwrite each other: use a "
        "service that honours If-None-Match (S3, GCS, Azure, MinIO, R2), a local disk or NFS.",
    )


def _clock(objects: Objects) -> Check:
    path = _probe()
    before = time.time()
    objects.put(path, b"now")
    after = time.time()
    found = next((info.modified for info in objects.list("doctor") if info.path.endswith(path)), None)
    objects.delete([path])
    if found is None:
        return Check("clock", "failed", f"{objects.uri} does not list what was written: use a consistent storage.")
    skew = max(before - 1.0 - found, found - after - 1.0, 0.0)  # services tell whole seconds
    if skew > MOST_SKEW_S:
        told = f"the storage's clock and this machine's differ by {skew:.0f} s, and leases are timed: set both by NTP."
        return Check("clock", "warning", told)
    return Check("clock", "ok", f"the storage's clock and this machine's agree within {skew + 1:.0f} s.")


def _existing_parent(place: str) -> Path:
    path = Path(place).expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _remove_empty(folder: Path, existing: Path) -> None:
    """Removes the empty folders that the checks have made: up to the one that was there before."""
    with contextlib.suppress(OSError):  # not empty: somebody else has written there
        while folder != existing and existing in folder.parents:
            folder.rmdir()
            folder = folder.parent


def _space(what: str, place: str) -> Check:
    name = f"space for {what}"
    if "://" in place:
        return Check(name, "ok", f"{place} has no limit that can be seen from here.")
    folder = _existing_parent(place)
    free = shutil.disk_usage(folder).free
    told = f"{free / GB:.1f} GB are free at {folder}"
    if free < LITTLE_SPACE_BYTES:
        status: Literal["warning", "failed"] = "failed" if free < NO_SPACE_BYTES else "warning"
        return Check(name, status, f"{told}: make room, or choose another place.")
    return Check(name, "ok", f"{told}.")


def _shared_memory() -> Check:
    place = Path("/dev/shm")
    if not place.is_dir():
        return Check("shared memory", "ok", "this system has no /dev/shm; Ray keeps objects on disk.")
    free = shutil.disk_usage(place).free
    if free < LITTLE_SHARED_BYTES:
        return Check(
            "shared memory",
            "warning",
            f"/dev/shm has {free / GB:.2f} GB, so Ray keeps objects on disk, which is slow: start the container with "
            "--shm-size=4g, or mount a larger /dev/shm.",
        )
    return Check("shared memory", "ok", f"/dev/shm has {free / GB:.1f} GB free.")


def _token() -> Check:
    path = token_file()
    if path is None:
        mode = os.environ.get("RAY_AUTH_MODE", "token")
        if mode.lower() != "token":
            told = f"RAY_AUTH_MODE={mode}: a cluster lets in whoever reaches its ports; unset it where others can."
            return Check("token", "warning", told)
        return Check("token", "ok", "Ray's token is in RAY_AUTH_TOKEN.")
    if not path.exists():
        return Check("token", "ok", f"there is no {path} yet; it is made when a cluster is started here.")
    mode_bits = path.stat().st_mode & 0o777
    if mode_bits & 0o077:
        return Check("token", "warning", f"{path} can be read by others (mode {mode_bits:04o}): chmod 600 {path}.")
    return Check("token", "ok", f"Ray's token is in {path}, which nobody else can read.")


def _cluster(address: str | None) -> Check:
    if address is None:
        return Check("cluster", "ok", f"no address is given: a run starts Ray {ray.__version__} on this machine.")
    try:
        return _job_server(address) if address.startswith(("http://", "https://")) else _joined(address)
    except (UserError, OSError, HTTPException, ValueError) as error:
        told = f"{address} cannot be joined ({error}): check the address, the token and the network."
        return Check("cluster", "failed", told)


def _joined(address: str) -> Check:
    """Checks the address at which a program joins."""
    if found := re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address):  # Ray itself tries for minutes
        socket.create_connection((found[1], int(found[2])), timeout=_NETWORK_TIMEOUT_S).close()
    with connected(address, setting="--address"):
        alive = [node for node in ray.nodes() if node["Alive"]]
        resources = ray.cluster_resources()
    told = f"{len(alive)} nodes, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
    return Check("cluster", "ok", f"{address} runs Ray {ray.__version__}, as this machine does: {told}.")


def _job_server(address: str) -> Check:
    """Checks the address that jobs are submitted to."""
    path = token_file()
    token = os.environ.get("RAY_AUTH_TOKEN") or (path.read_text().strip() if path and path.exists() else "")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with urlopen(Request(f"{address.rstrip('/')}/api/version", headers=headers), timeout=_NETWORK_TIMEOUT_S) as reply:
        answer = json.load(reply)
    if not isinstance(answer, dict) or "ray_version" not in answer:
        raise ValueError("it answers otherwise than Ray's job server does")
    theirs = str(answer["ray_version"])
    if theirs != ray.__version__:
        told = f"{address} runs Ray {theirs} and this machine {ray.__version__}: install the same version on both."
        return Check("cluster", "failed", told)
    return Check("cluster", "ok", f"{address} runs Ray {theirs}, as this machine does.")


def _backbone(backbone: BackboneSection) -> Check:
    name = " ".join(filter(None, (backbone.name, backbone.pretrained)))
    file = weights_file(backbone)
    if file is not None:
        return Check("backbone", "ok", f"the weights of {name} are in {file}.")
    if backbone.name.endswith(".py") or backbone.name.startswith("local-dir:"):
        return Check("backbone", "failed", f"there is no {backbone.name}: set backbone.name to where it is.")
    return Check(
        "backbone",
        "warning",
        f"the weights of {name} are not on this machine and are fetched when a run starts: see that it has a network, "
        "or set backbone.pretrained to a local file of weights.",
    )


def _port(what: str, port: int) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            told = f"{port} cannot be listened at ({error.strerror}): end what has it, or choose another for {what}."
            return Check("port", "warning", told)
    return Check("port", "ok", f"{port} is free for {what}.")
