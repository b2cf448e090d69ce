"""The HTTP application knows no Ray: it has routes, and says what each may answer."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp
from torch import Tensor

import diki_ray
from diki_ray.answering.class_features import Candidates
from diki_ray.errors import CorruptError
from diki_ray.prediction.run_predictor import Squares
from diki_ray.serving.batches import Batches
from diki_ray.serving.decoding import Decoder
from diki_ray.serving.engine import Question, answer_questions
from diki_ray.serving.guard import BodyTooLarge, Guard, too_large
from diki_ray.serving.metrics import Metrics, exposition
from diki_ray.serving.page import PAGE, POLICY
from diki_ray.serving.schema import (
    DEFAULT_TEMPLATE,
    MAX_NAME_LENGTH,
    Asked,
    Health,
    ImageAnswer,
    PredictResponse,
    Problem,
    TaskInfo,
    TasksResponse,
)
from diki_ray.serving.settings import Settings
from diki_ray.serving.snapshot import Snapshot, Snapshots
from diki_ray.serving.uploads import Refusal, from_form, from_json, request_body, to_pixels

logger = logging.getLogger(__name__)

Ask = Callable[[Question], Awaitable[ImageAnswer | None]]
"""Answers one image, together with whatever else waits; None once its deadline is over."""

SMALL_BODY_BYTES = 2**16
"""Reading so much JSON, of a few values, takes less time than passing it to another thread."""
MAX_SMALL_VALUES = 64
ROUTES = ("/", "/healthz", "/metrics", "/openapi.json", "/predict", "/tasks")


class Service:
    """Holds what a replica needs: the run, the model's thread, the threads that decode. `ask` answers a question, by
    default together with whatever else waits."""

    def __init__(self, settings: Settings, ask: Ask | None = None) -> None:
        warnings.filterwarnings("ignore", module="PIL")  # its remarks on odd files, of which strangers may send many
        self.settings = settings
        self.snapshots = Snapshots(settings)
        self.metrics = Metrics(self.snapshots)
        self.ask = ask or self._ask
        self.decoders = ThreadPoolExecutor(settings.decode_threads, "diki-serve-decode")
        squares = Squares.of(self.snapshots.backbone.preprocess)
        self._decoder = Decoder(
            settings.decode_threads, settings.decode_timeout_s, None if squares is None else squares.size_px
        )
        self._num_waiting = 0
        self._batches = Batches(
            self._answer_together, settings.max_batch_size, settings.batch_wait_s, lambda: self._num_waiting
        )
        self._counting = threading.Lock()  # requests come in the event loops of a replica's door and of Ray Serve

    async def predict(self, files: list[bytes], asked: Asked, deadline: float) -> PredictResponse:
        """Answers all images under the snapshot that is current now.

        Raises:
            Refusal: an image that cannot be used, or nothing to choose among. Busy: too many images wait.
        """
        snapshot = self.snapshots.current
        if self._num_waiting + len(files) > self.settings.max_waiting_images:
            raise Busy
        self._waits(len(files))
        try:
            loop = asyncio.get_running_loop()
            if asked.classes is None:
                candidates = self._learnt(snapshot)
            else:
                candidates = await loop.run_in_executor(self.decoders, self._named, asked)
            preprocess = snapshot.predictor.backbone.preprocess
            pixels = await asyncio.gather(
                *(
                    loop.run_in_executor(self.decoders, self._pixels, data, f"images[{n}]", preprocess, deadline)
                    for n, data in enumerate(files)
                )
            )
            questions = [Question(p, snapshot, candidates, deadline) for p in pixels]
            answers = await asyncio.gather(*map(self.ask, questions))
        finally:
            self._waits(-len(files))
        known = [answer for answer in answers if answer is not None]
        if len(known) < len(answers):
            raise TimeoutError
        for answer in known:
            self.metrics.answered(answer)
        return PredictResponse(version=snapshot.version, answers=known)

    def tasks(self) -> TasksResponse:
        snapshot = self.snapshots.current
        infos = [
            TaskInfo(name=m.task, class_names=list(m.class_names), templates=list(m.templates), digest=digest)
            for m, digest in zip(snapshot.predictor.modules, snapshot.digests, strict=True)
        ]
        return TasksResponse(
            run=self.settings.run,
            version=snapshot.version,
            tasks=infos,
            text_grid=self.settings.text_grid,
            text_feature_error=self.snapshots.text_feature_error,
            stale_since=self.snapshots.stale_since,
        )

    def close(self) -> None:
        self.snapshots.close()
        self.decoders.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()
        self._batches.close()

    def _named(self, asked: Asked) -> tuple[Candidates, ...]:
        return (self.snapshots.vocabularies.named(asked.classes or (), asked.template or DEFAULT_TEMPLATE),)

    def _learnt(self, snapshot: Snapshot) -> tuple[Candidates, ...]:
        if not snapshot.learnt:
            raise Refusal(422, "the run has no task at present: give the classes to choose from.", "no classes")
        return snapshot.learnt

    def _pixels(self, data: bytes, where: str, preprocess: Callable[[Any], Tensor], deadline: float) -> Tensor:
        if time.monotonic() > deadline:  # it waited for others' images, and nobody waits for it any more
            raise TimeoutError
        return to_pixels(data, where, self._decoder, preprocess, self.settings)

    def _waits(self, more: int) -> None:
        with self._counting:
            self._num_waiting += more
            self.metrics.waiting.set(self._num_waiting)

    async def _ask(self, question: Question) -> ImageAnswer | None:
        return await asyncio.wrap_future(self._batches.ask(question))

    def _answer_together(self, questions: list[Question]) -> list[ImageAnswer | None]:
        """Answers these questions in one pass."""
        started = time.monotonic()
        answers = answer_questions(questions)
        self.metrics.batch_images.observe(len(questions))
        self.metrics.batch_seconds.observe(time.monotonic() - started)
        return answers


class Busy(Exception):
    """More images wait already than may."""


MetricsOfAll = Callable[[], Awaitable[Mapping[str, list[Metric]]]]


def build_app(service: Service, metrics_of_all: MetricsOfAll | None = None) -> ASGIApp:
    """Builds the service's application. metrics_of_all gives those of every replica by name; by default of this one."""
    app = FastAPI(
        title="diki_ray",
        version=diki_ray.__version__,
        description="Answers images with what a run has learnt.",
        docs_url=None,  # they load scripts from another server
        redoc_url=None,
        redirect_slashes=False,
    )
    refusals: dict[int | str, dict[str, Any]] = {401: {"model": Problem, "description": "No token, or a wrong one."}}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    @app.get("/healthz", summary="Whether requests are answered. Asks for no token.")
    async def healthz() -> Health:
        return Health(status="ok")

    @app.get("/tasks", summary="What the run has learnt, and the version that is served.", responses=refusals)
    async def tasks() -> TasksResponse:
        return service.tasks()

    @app.get("/metrics", summary="Metrics for Prometheus.", response_class=Response, responses=refusals)
    async def metrics() -> Response:
        replicas = {"0": service.metrics.collected()} if metrics_of_all is None else await metrics_of_all()
        return Response(exposition(dict(replicas)), media_type=CONTENT_TYPE_LATEST)

    @app.post(
        "/predict",
        summary="Answer images, among the classes learnt or among classes given.",
        response_model=PredictResponse,
        responses=refusals | {status: {"model": Problem, "description": what} for status, what in _PROBLEMS.items()},
        openapi_extra={"requestBody": request_body(service.settings)},
    )
    async def predict(request: Request) -> Response:
        response = await _predict(service, request)
        return Response(response.model_dump_json(), media_type="application/json")

    _handle_errors(app, service)
    if service.settings.token_sha256 is not None:
        _ask_for_token(app)

    def observe(route: str, status: int, seconds: float) -> None:
        service.metrics.requests.labels(route, str(status)).inc()
        service.metrics.seconds.labels(route).observe(seconds)

    return Guard(app, service.settings, ROUTES, observe)


async def _predict(service: Service, request: Request) -> PredictResponse:
    settings = service.settings
    deadline = time.monotonic() + settings.request_timeout_s
    try:
        async with asyncio.timeout(settings.request_timeout_s):
            files, asked = await _read(service, request)
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {settings.request_timeout_s:g} s.", "slow") from None
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await service.predict(files, asked, deadline)
    except TimeoutError:
        raise Refusal(504, f"there was no answer within {settings.request_timeout_s:g} s.", "late") from None
    except Busy:
        raise Refusal(503, "too many images wait already: try again in a second.", "busy") from None
    except CorruptError as error:
        raise Refusal(500, str(error), "not finite") from error


async def _read(service: Service, request: Request) -> tuple[list[bytes], Asked]:
    settings = service.settings
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = await request.body()
        if len(body) <= SMALL_BODY_BYTES and body.count(b",") <= MAX_SMALL_VALUES:
            return from_json(body, settings)
        return await asyncio.get_running_loop().run_in_executor(service.decoders, from_json, body, settings)
    if kind == "multipart/form-data":
        num_fields = settings.max_classes + 1
        # No field is longer than this by the limit of a class name; parts are counted before they are kept.
        form = request.form(max_files=settings.max_images, max_fields=num_fields, max_part_size=16 * MAX_NAME_LENGTH)
        async with form as fields:
            return await from_form(fields, settings)
    raise Refusal(415, "send multipart/form-data or application/json.", "content type")


def _handle_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        service.metrics.refused.labels(refusal.reason).inc()
        headers = {"Retry-After": "1"} if refusal.status == 503 else None
        return JSONResponse({"error": str(refusal)}, refusal.status, headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(BodyTooLarge)
    async def larger(request: Request, error: BodyTooLarge) -> JSONResponse:
        status, sentence = too_large(service.settings)
        return JSONResponse({"error": sentence}, status)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return JSONResponse({"error": "the client went away."}, 400)


_PROBLEMS = {
    400: "No JSON, or no multipart form.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "Neither JSON nor a multipart form.",
    422: "Wrong fields, or an image that cannot be used.",
    500: "What was learnt gives no finite numbers.",
    503: "Too many images wait already.",
    504: "No answer in time.",
}


def _ask_for_token(app: FastAPI) -> None:
    """Says in the OpenAPI document that a token is asked for; the guard is who asks."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            if path != "/healthz":
                for operation in operations.values():
                    operation["security"] = [{"token": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
