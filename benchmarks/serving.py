"""The server against a plain one of a few lines around the same engine, and against the engine alone, in one run.

All answer the same images with the same modules on one thread of torch. `served` is `diki-ray serve` with one replica,
`app` its application without Ray and its front, `plain` FastAPI in uvicorn without any of ours but the engine; `engine`
is fed decoded images by threads of its own process. The clients are one process beside them.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np
import torch

from benchmarks.decoding import picture_file
from benchmarks.growth import BACKBONE
from benchmarks.world import World
from diki_ray.config import parse
from diki_ray.data.images import decode_image
from diki_ray.learning.module import TaskModule
from diki_ray.prediction.run_predictor import Squares
from diki_ray.serving.batches import Batches
from diki_ray.serving.decoding import Decoder
from diki_ray.serving.engine import Question, answer_questions
from diki_ray.serving.settings import Settings
from diki_ray.serving.snapshot import Snapshots
from diki_ray.serving.uploads import from_json
from diki_ray.store.process import this_process
from diki_ray.store.run_store import CONFIG_DOCUMENT, RunStore

ROOT = Path(__file__).parents[1]
RUN = "served"
CLIENTS = 16
FEEDERS = 2
"""Threads that preprocess for the engine alone: as many as decode in a replica."""
LOADS = {"64 px PNG": ("PNG", 64, 1), "500 px JPEG": ("JPEG", 500, 1), "8 of 64 px PNG": ("PNG", 64, 8)}
"""Format, size and images of each request."""
IMAGES_PER_CLASS = 4
NOISE = 0.3
"""Standard deviation of what is added to a task's picture to make its training images, after preprocessing."""
REQUEST_TIMEOUT_S = 600.0
"""A large tower on a CPU takes minutes for what 16 clients ask at once."""
_START_S = 120.0


def serving(world: World, num_tasks: int, num_classes: int, seconds: float, rounds: int) -> Iterator[dict[str, Any]]:
    """Images a second and the time of requests, for each load of each of the four, which take turns."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        settings = stored_run(world, Path(folder), num_tasks, num_classes)
        kinds = ("served", "app", "plain")
        ports = {k: servers.enter_context(server(k, settings, world.device)).port for k in kinds}
        for load in LOADS:
            yield from _of_load(load, Path(folder), settings, ports, seconds, rounds)


def _of_load(
    load: str, folder: Path, settings: Settings, ports: dict[str, int], seconds: float, rounds: int
) -> list[dict[str, Any]]:
    image_format, size, per_request = LOADS[load]
    files = [picture_file(seed, image_format, size) for seed in range(CLIENTS * per_request)]
    bodies = [request_body(files[n * per_request : (n + 1) * per_request]) for n in range(CLIENTS)]
    (folder / "bodies").write_text("\n".join(body.decode() for body in bodies))
    taken: dict[str, list[float]] = {kind: [] for kind in ports}
    took, engine = dict.fromkeys(ports, 0.0), list[float]()
    for port in ports.values():  # a warm-up: class features are computed when they are first needed
        ask(port, folder / "bodies", min(1.0, seconds))
    for _ in range(rounds):
        for kind, port in ports.items():
            found = ask(port, folder / "bodies", seconds)
            taken[kind] += found.taken
            took[kind] += found.seconds
        engine.append(engine_rate(settings, files, seconds))
    rates = {kind: len(s) * per_request / took[kind] for kind, s in taken.items()}
    rates["engine"] = float(np.median(engine))
    return [
        {
            "load": load,
            "of": kind,
            "images_per_s": rate,
            "of_plain": rate / rates["plain"],
            "of_engine": rate / rates["engine"],
            "p50_ms": 1000 * float(np.percentile(taken[kind], 50)) if kind in taken else None,
            "p99_ms": 1000 * float(np.percentile(taken[kind], 99)) if kind in taken else None,
        }
        for kind, rate in rates.items()
    ]


def stages(world: World, num_tasks: int, num_classes: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of processor time an image of each thing that a replica and the process of its model do, each alone:
    what is left of a request is its way. Of decoding in a child it is what the replica's own process has to do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a replica has
    with tempfile.TemporaryDirectory() as folder:
        settings = stored_run(world, Path(folder), num_tasks, num_classes)
        snapshot = Snapshots(settings).current
        squares = Squares.of(snapshot.predictor.backbone.preprocess)
        assert squares is not None
        decoder = Decoder(1, 10.0, squares.size_px)
        rows = []
        for load, (image_format, size, _) in LOADS.items():
            if load.startswith("8"):
                continue
            files = [picture_file(seed, image_format, size) for seed in range(CLIENTS)]
            scaled = [decoder.decode(data, 10**8) for data in files]
            bodies = [request_body([data]) for data in files]
            pixels = squares.pixels([image.rgb for image in scaled])
            asked = [Question(p, snapshot, snapshot.learnt, time.monotonic() + 3600) for p in pixels]
            answers = [a for a in answer_questions(asked) if a is not None]
            acts = {
                "body_to_file": lambda bodies=bodies: [from_json(body, settings) for body in bodies],
                "decoded_here": lambda files=files: [decode_image(data) for data in files],
                "decoded_in_a_child": lambda files=files: [decoder.decode(data, 10**8) for data in files],
                "pixels_of_8": lambda scaled=scaled: [
                    squares.pixels([image.rgb for image in scaled[n : n + 8]]) for n in (0, 8)
                ],
                "engine_1_a_pass": lambda asked=asked: [answer_questions([question]) for question in asked],
                "engine_8_a_pass": lambda asked=asked: [answer_questions(asked[n : n + 8]) for n in (0, 8)],
                "engine_16_a_pass": lambda asked=asked: answer_questions(asked),
                "answer_to_body": lambda answers=answers: [answer.model_dump_json() for answer in answers],
            }
            rows.append({"load": load} | {f"{name}_ms": _ms_an_image(act, rounds) for name, act in acts.items()})
        decoder.close()
        torch.set_num_threads(threads)
        return rows


def _ms_an_image(act: Any, rounds: int) -> float:
    act()
    seconds = []
    for _ in range(3 * rounds):
        started = time.process_time()
        act()
        seconds.append(time.process_time() - started)
    return 1000 * min(seconds) / CLIENTS


def stored_run(world: World, folder: Path, num_tasks: int, num_classes: int) -> Settings:
    """A run with random modules, told apart by the noise of their images."""
    names = [[f"{name} of {task}" for name in world.names(num_classes)] for task in range(num_tasks)]
    modules = [world.module(task, names[task], world.images(96, task)) for task in range(num_tasks)]
    return stored(world, folder, modules, "task")


def stored(world: World, folder: Path, modules: Sequence[TaskModule], density: str) -> Settings:
    """A run that has these modules and tells their tasks apart by `density`, as replicas find it."""
    backbone = folder / "backbone.py"
    backbone.write_text(BACKBONE.format(model=world.model))
    method = {f"{tower}_depth": depth for tower, depth in world.method.depth.items()}
    config = parse(
        {
            "run": {"name": RUN, "storage": str(folder / "storage")},
            "tasks": [{"data": f"embedded:{module.task}"} for module in modules],
            "backbone": {"name": str(backbone)},
            "method": method | {"image_length": 8, "text_length": 8},
            "statistics": {"shrinkage": "oas"},
            "routing": {"density": density},
            "train": {"device": world.device},
        }
    )
    store = RunStore.open(config.run.storage, RUN)
    epoch = store.acquire(this_process("benchmark"))
    store.put_document(epoch, CONFIG_DOCUMENT, config.to_yaml())
    for module in modules:
        commit(store, epoch, module)
    store.release(epoch)
    return Settings(storage=config.run.storage, run=RUN, backbone=str(backbone), request_timeout_s=REQUEST_TIMEOUT_S)


def picture_module(world: World, task: int, num_classes: int) -> TaskModule:
    """A random module of a task that knows its own picture: its training images are this one with noise."""
    picture = world.backbone.preprocess(decode_image(task_file(task)))
    generator = torch.Generator().manual_seed(task)
    noise = torch.randn(IMAGES_PER_CLASS * num_classes, *picture.shape, generator=generator)
    names = [f"{name} of {task}" for name in world.names(num_classes)]
    labels = torch.arange(len(noise)) % num_classes
    return world.module(task, names, (picture + NOISE * noise).to(world.device), labels)


def task_file(task: int) -> bytes:
    return picture_file(task, "PNG", 64)


def commit(store: RunStore, epoch: int, module: TaskModule) -> None:
    store.commit_module(epoch, f"{int(module.task):064x}", module.task, module.to_bytes())


def request_body(files: Sequence[bytes]) -> bytes:
    return json.dumps({"images": [base64.b64encode(data).decode() for data in files]}).encode()


def engine_rate(settings: Settings, files: Sequence[bytes], seconds: float) -> float:
    """Images a second of the engine, whose images threads of this process preprocess from decoded ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    snapshot, images = Snapshots(settings).current, [decode_image(data) for data in files]
    engine = Batches(answer_questions, settings.max_batch_size, settings.batch_wait_s, lambda: 0)
    preprocess = snapshot.predictor.backbone.preprocess
    asked = [Question(preprocess(image), snapshot, snapshot.learnt, float("inf")) for image in images]
    for first in range(0, len(asked), settings.max_batch_size):  # class features are computed when first needed
        answer_questions(asked[first : first + settings.max_batch_size])
    started = time.perf_counter()
    end = started + seconds

    def feed(first: int) -> int:
        """A few passes of images are under way at any time, so that the engine never waits."""
        under_way, done = list[Any](), 0
        while time.perf_counter() < end:
            image = images[(first + done) % len(images)]
            under_way.append(engine.ask(Question(preprocess(image), snapshot, snapshot.learnt, float("inf"))))
            if len(under_way) >= 2 * settings.max_batch_size:
                under_way.pop(0).result()
                done += 1
        return done + sum(future.result() is not None for future in under_way)

    try:
        with ThreadPoolExecutor(FEEDERS) as feeders:
            answered = sum(feeders.map(feed, range(FEEDERS)))
            return answered / (time.perf_counter() - started)
    finally:
        engine.close()
        torch.set_num_threads(threads)


class Asked(NamedTuple):
    taken: list[float]
    """The seconds of every request."""
    seconds: float
    """From the first request to the last answer."""


def ask(port: int, bodies: Path, seconds: float) -> Asked:
    """What clients in a process of their own, which ask for so long with the lines of `bodies`, had to wait."""
    command = [sys.executable, "-m", "benchmarks.clients", port, bodies, CLIENTS, seconds]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=True)
    return Asked(**json.loads(done.stdout))


class Server(NamedTuple):
    port: int
    pid: int


@contextmanager
def server(kind: str, settings: Settings, device: str, num_replicas: int = 1) -> Iterator[Server]:
    """One of the servers that are compared, while in the block; only the platform's has several replicas."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = [settings.storage, settings.run, settings.backbone, settings.request_timeout_s]
    if kind == "served":
        options = zip(("--storage", "--run", "--backbone", "--request-timeout-s"), run, strict=True)
        given = [word for option in options for word in option]
        command = [ROOT / "jobs" / "serve.py", *given, "--port", port, "--no-token", "--replicas", num_replicas]
        command += ["--gpus-per-replica", 1] if device == "cuda" else []
    else:
        command = ["-m", "benchmarks.serving_processes", kind, port, *run]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))  # for the backbone's file
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process)
        yield Server(port, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("a server of the benchmark did not start")
