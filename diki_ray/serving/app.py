"""The HTTP application knows no Ray: it has routes, and says what each may answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

import diki_ray
from diki_ray.serving.decoding import Decoder
from diki_ray.serving.guard import BodyTooLarge, Guard, too_large
from diki_ray.serving.metrics import Metrics, exposition
from diki_ray.serving.page import PAGE, POLICY
from diki_ray.serving.schema import (
    MAX_NAME_LENGTH,
    Answered,
    Asked,
    Health,
    PredictResponse,
    Problem,
    TasksResponse,
)
from diki_ray.serving.settings import Settings
from diki_ray.serving.uploads import Refusal, from_form, from_json, request_body, to_pixels

SMALL_BODY_BYTES = 2**16
"""Reading so much JSON, of a few values, takes less time than passing it to another thread."""
MAX_SMALL_VALUES = 64
ROUTES = ("/", "/healthz", "/metrics", "/openapi.json", "/predict", "/tasks")


class Model(Protocol):
    """What answers: a LoadedModel, or a ModelProcess around one, where each method is described."""

    size_px: int | None

    def ask(
        self, images: Sequence[bytes], asked: Asked, deadline: float, num_inside: int
    ) -> list[Future[Answered | None]]: ...

    def preprocessed(self, rgb: bytes, width: int, height: int) -> bytes: ...

    def tasks(self) -> TasksResponse: ...

    def exposed(self) -> str: ...

    def close(self) -> None: ...


class Service:
    """Holds what a replica needs: the model, the threads that decode, and what is counted."""

    def __init__(self, settings: Settings, model: Model) -> None:
        self.settings = settings
        self.model = model
        self.metrics = Metrics(settings.run)
        self.threads = ThreadPoolExecutor(settings.decode_threads, "diki-serve-decode")
        self._decoder = Decoder(settings.decode_threads, settings.decode_timeout_s, model.size_px)
        self._num_waiting = 0
        self._counting = threading.Lock()  # requests come in the event loops of a replica's door and of Ray Serve

    async def predict(self, files: list[bytes], asked: Asked, deadline: float) -> bytes:
        """Answers all images under the model that is current when the last of them is decoded; the JSON of a
        PredictResponse.

        Raises:
            Refusal: an image that cannot be used, or nothing to choose among. Busy: too many images wait.
        """
        if self._num_waiting + len(files) > self.settings.max_waiting_images:
            raise Busy
        self._waits(len(files))
        try:
            loop = asyncio.get_running_loop()
            images = await asyncio.gather(
                *(
                    loop.run_in_executor(self.threads, self._pixels, data, f"images[{n}]", deadline)
                    for n, data in enumerate(files)
                )
            )
            asking = self.model.ask(images, asked, deadline, self._num_waiting)
            answers = await asyncio.gather(*map(asyncio.wrap_future, asking))
        finally:
            self._waits(-len(files))
        known = [answer for answer in answers if answer is not None]
        if len(known) < len(answers):
            raise TimeoutError
        for answer in known:
            self.metrics.answered(answer.task)
        texts = b",".join(answer.text for answer in known)
        return b'{"version":%d,"answers":[%b]}' % (known[0].version, texts)

    async def tasks(self) -> TasksResponse:
        return await asyncio.to_thread(self.model.tasks)

    async def collected(self) -> list[Metric]:
        """Returns all metrics as they are now: of requests, and of the model."""
        exposed = await asyncio.to_thread(self.model.exposed)
        return [*self.metrics.registry.collect(), *text_string_to_metric_families(exposed)]

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()
        self.model.close()

    def _pixels(self, data: bytes, where: str, deadline: float) -> bytes:
        if time.monotonic() > deadline:  # it waited for others' images, and nobody waits for it any more
            raise TimeoutError
        return to_pixels(data, where, self._decoder, self.model.preprocessed, self.settings)

    def _waits(self, more: int) -> None:
        with self._counting:
            self._num_waiting += more
            self.metrics.waiting.set(self._num_waiting)


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
        return await service.tasks()

    @app.get("/metrics", summary="Metrics for Prometheus.", response_class=Response, responses=refusals)
    async def metrics() -> Response:
        replicas = {"0": await service.collected()} if metrics_of_all is None else await metrics_of_all()
        return Response(exposition(dict(replicas)), media_type=CONTENT_TYPE_LATEST)

    @app.post(
        "/predict",
        summary="Answer images, among the classes learnt or among classes given.",
        response_model=PredictResponse,
        responses=refusals | {status: {"model": Problem, "description": what} for status, what in _PROBLEMS.items()},
        openapi_extra={"requestBody": request_body(service.settings)},
    )
    async def predict(request: Request) -> Response:
        return Response(await _predict(service, request), media_type="application/json")

    _handle_errors(app, service)
    if service.settings.token_sha256 is not None:
        _ask_for_token(app)

    def observe(route: str, status: int, seconds: float) -> None:
        service.metrics.requests.labels(route, str(status)).inc()
        service.metrics.seconds.labels(route).observe(seconds)

    return Guard(app, service.settings, ROUTES, observe)


async def _predict(service: Service, request: Request) -> bytes:
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


async def _read(service: Service, request: Request) -> tuple[list[bytes], Asked]:
    settings = service.settings
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = await request.body()
        if len(body) <= SMALL_BODY_BYTES and body.count(b",") <= MAX_SMALL_VALUES:
            return from_json(body, settings)
        return await asyncio.get_running_loop().run_in_executor(service.threads, from_json, body, settings)
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
