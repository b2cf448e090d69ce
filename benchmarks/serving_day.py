"""A server of many tasks: at rest, while tasks are being learnt, and for as many requests as a day may have.

Each request asks for an image of one of the tasks, which take turns. Tasks are told apart by the class model and
answered beside it, as by default. Memory is that of the largest replica, of the largest process of a model, and of the
process with the front.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import psutil

from benchmarks.serving import RUN, Server, ask, commit, picture_module, request_body, server, stored, task_file
from benchmarks.world import World
from diki_ray.learning.module import TaskModule
from diki_ray.serving.settings import Settings
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore

REPLICAS = (1, 2)
TENTHS = 10


def serving_day(world: World, num_tasks: int, num_classes: int, seconds: float, requests: int) -> list[dict[str, Any]]:
    """Rows for each number of replicas: the tasks' first answers; at rest, and while a task is committed every second,
    each for `seconds`. Then one for every tenth of the requests, with one replica."""
    modules = [picture_module(world, task, num_classes) for task in range(num_tasks + int(seconds) + 2)]
    rows = []
    for replicas in REPLICAS:
        with tempfile.TemporaryDirectory() as name:
            settings = stored(world, Path(name), modules[:num_tasks], "classes")
            bodies = Path(name) / "bodies"
            bodies.write_text("\n".join(request_body([task_file(task)]).decode() for task in range(num_tasks)))
            with server("served", settings, world.device, replicas) as running:
                rows.append({"when": "first answers"} | _first_answers(running, replicas, bodies))
                rows.append({"when": "at rest"} | _row(running, replicas, bodies, seconds))
                with _learning(settings, modules[num_tasks:]):
                    rows.append({"when": "learning"} | _row(running, replicas, bodies, seconds))
                if replicas == REPLICAS[0]:
                    rows += _day(running, bodies, requests, rows[1]["images_per_s"])
    return rows


def _first_answers(running: Server, replicas: int, bodies: Path) -> dict[str, Any]:
    """Each task's first answer, one after another, in which its text prompts meet all tasks' class names. A replica
    that was not asked computes them when it is, in the rows that follow."""
    taken = []
    for body in bodies.read_bytes().splitlines() * replicas:
        started = time.perf_counter()
        while not _answered(running.port, body):
            pass
        taken.append(time.perf_counter() - started)
    return _times(replicas, taken, sum(taken)) | _memory(running.pid)


def _answered(port: int, body: bytes) -> bool:
    """False where there was no answer in time; what was computed for it is kept."""
    request = Request(f"http://127.0.0.1:{port}/predict", body, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=120):
            return True
    except HTTPError as error:
        if error.code != 504:
            raise
        return False


def _day(running: Server, bodies: Path, requests: int, rate: float) -> Iterator[dict[str, Any]]:
    answered = 0
    while answered < requests:
        row = _row(running, REPLICAS[0], bodies, max(0.5, requests / TENTHS / rate))
        answered += row["requests"]
        yield {"when": f"{answered:,} asked"} | row


def _row(running: Server, replicas: int, bodies: Path, seconds: float) -> dict[str, Any]:
    return _times(replicas, *ask(running.port, bodies, seconds)) | _memory(running.pid)


def _times(replicas: int, taken: list[float], seconds: float) -> dict[str, Any]:
    p50, p99 = (1000 * float(np.percentile(taken, percent)) for percent in (50, 99))
    found = {"replicas": replicas, "requests": len(taken), "images_per_s": len(taken) / seconds}
    return found | {"p50_ms": p50, "p99_ms": p99}


def _memory(pid: int) -> dict[str, float]:
    """Resident megabytes."""
    job = psutil.Process(pid)
    found = {"replica_mb": "ServeReplica", "model_mb": "diki_ray.serving.model_process"}
    children = [(" ".join(child.cmdline()), child.memory_info().rss) for child in job.children(recursive=True)]
    largest = {column: max(rss for said, rss in children if name in said) / 1e6 for column, name in found.items()}
    return largest | {"front_mb": job.memory_info().rss / 1e6}


@contextmanager
def _learning(settings: Settings, modules: list[TaskModule]) -> Iterator[None]:
    """Commits one of the modules every second while in the block."""
    ended = threading.Event()
    store = RunStore.open(settings.storage, RUN)
    epoch = store.acquire(this_process("benchmark"))

    def learn() -> None:
        for module in modules:
            if ended.wait(1.0):
                return
            commit(store, epoch, module)

    thread = threading.Thread(target=learn)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        store.release(epoch)
