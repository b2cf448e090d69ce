"""What stands beside the platform's server in the serving section, each as a process of its own:

    python -m benchmarks.serving_processes plain|app PORT STORAGE RUN BACKBONE TIMEOUT   a server, until it is ended

`plain` is what one writes in ten lines: FastAPI in uvicorn, whose threads decode, and a lock around the engine. `app`
is the platform's application in the same uvicorn: what the server would be without Ray and without its front.
"""

from __future__ import annotations

import gc
import sys
import threading
import time

import torch
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from diki_ray.data.images import decode_image
from diki_ray.serving.app import Service, build_app
from diki_ray.serving.engine import Question, answer_questions
from diki_ray.serving.model_process import ModelProcess
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
    app = plain(settings) if kind == "plain" else build_app(Service(settings, ModelProcess(settings)))
    if kind == "app":
        gc.freeze()  # as a replica does
    uvicorn.run(app, port=port, log_level="critical", access_log=False)


if __name__ == "__main__":
    kind, port, *run = sys.argv[1:]
    serve(kind, int(port), *run)
