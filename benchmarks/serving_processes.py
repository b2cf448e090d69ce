"""What stands beside the platform's server in the serving section, each as a process of its own:

    python -m benchmarks.serving_processes plain|app PORT STORAGE RUN BACKBONE TIMEOUT   a server, until it is ended
    python -m benchmarks.serving_processes clients PORT FILE CLIENTS SECONDS   prints what each request took, and all

`plain` is what one writes in ten lines: FastAPI in uvicorn, whose threads decode, and a lock around the engine. `app`
is the platform's application in the same uvicorn: what the server would be without Ray and without its front.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from diki_ray.data.images import decode_image
from diki_ray.serving.app import Service, build_app
from diki_ray.serving.engine import Question, answer_questions
from diki_ray.serving.schema import PredictRequest, PredictResponse
from diki_ray.serving.settings import Settings
from diki_ray.serving.snapshot import Snapshots


def plain(settings: Settings) -> ASGIApp:
    snapshot, app, model = Snapshots(settings).current, FastAPI(), threading.Lock()

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/predict")
    def predict(request: PredictRequest) -> PredictResponse:
        pixels = [snapshot.predictor.backbone.preprocess(decode_image(data)) for data in request.decoded()]
        with model:
            answers = answer_questions([Question(p, snapshot, snapshot.learnt, time.monotonic() + 60) for p in pixels])
        return PredictResponse(version=snapshot.version, answers=[answer for answer in answers if answer is not None])

    return app


def serve(kind: str, port: int, storage: str, run: str, backbone: str, request_timeout_s: str) -> None:
    torch.set_num_threads(1)  # as a replica has
    settings = Settings(storage=storage, run=run, backbone=backbone, request_timeout_s=float(request_timeout_s))
    app = plain(settings) if kind == "plain" else build_app(Service(settings))
    uvicorn.run(app, port=port, log_level="critical", access_log=False)


async def ask(port: int, bodies: list[bytes], num_clients: int, seconds: float) -> dict[str, Any]:
    """The seconds of every request of clients that each wait for an answer before they ask again, and how long it was
    until the last answer of those that were asked for within `seconds`."""
    head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    requests, taken = [head.format(len(body)).encode() + body for body in bodies], list[float]()
    began = time.perf_counter()
    end = began + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (started := time.perf_counter()) < end:
            writer.write(requests[number % len(requests)])
            answered = await reader.readuntil(b"\r\n\r\n")
            if not answered.startswith(b"HTTP/1.1 200"):
                raise AssertionError(f"not answered: {answered[:200]!r}")
            length = next(line for line in answered.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            taken.append(time.perf_counter() - started)
            number += 1
        writer.close()

    await asyncio.gather(*map(client, range(num_clients)))
    return {"taken": taken, "seconds": time.perf_counter() - began}


def main(kind: str, port: str, *arguments: str) -> None:
    if kind == "clients":
        file, num_clients, seconds = arguments
        bodies = [line.encode() for line in Path(file).read_text().splitlines()]
        print(json.dumps(asyncio.run(ask(int(port), bodies, int(num_clients), float(seconds)))))
    else:
        serve(kind, int(port), *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
