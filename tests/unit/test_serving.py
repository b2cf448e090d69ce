"""The HTTP application through its ASGI interface: what is answered, under which version, and what is refused."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from stored_run import CLASSES, TOKEN, StoredRun, as_json, picture, picture_file

from diki_ray.answering.class_features import FeatureCache, Tabulated
from diki_ray.errors import ConfigError
from diki_ray.prediction.run_predictor import load_predictor
from diki_ray.serving.app import Model, Service, build_app
from diki_ray.serving.engine import Question, answer_questions
from diki_ray.serving.loaded_model import LoadedModel
from diki_ray.serving.metrics import exposition
from diki_ray.serving.page import PAGE, POLICY
from diki_ray.serving.schema import Answered
from diki_ray.serving.settings import Settings, token_digest
from diki_ray.serving.snapshot import Snapshots

FAR = time.monotonic() + 1e6


@pytest.fixture(params=["task", "classes"])
def run(tmp_path: Path, request: pytest.FixtureRequest) -> StoredRun:
    return StoredRun(tmp_path, "warm", "cold", routing={"density": request.param})


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> StoredRun:
    return StoredRun(tmp_path_factory.mktemp("run"), "warm", "cold")


def service_of(run: StoredRun, **limits: Any) -> Service:
    settings = Settings(storage=run.storage, run="colours", backbone=run.config.backbone.name, **limits)
    return Service(settings, LoadedModel(settings))


def model_of(service: Service) -> LoadedModel:
    assert isinstance(service.model, LoadedModel)
    return service.model


@pytest.fixture(scope="module")
def service(unchanged: StoredRun) -> Iterator[Service]:
    service = service_of(unchanged)
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(build_app(service)) as client:
        yield client


def limited(service: Service, model: Model | None = None, **limits: object) -> TestClient:
    """A client of the same run and model under other settings."""
    other = copy.copy(service)
    other.settings = service.settings.model_copy(update=limits)
    other.model = model or service.model
    return TestClient(build_app(other))


# What is answered


def test_an_answer_is_the_predictors(unchanged: StoredRun, client: TestClient) -> None:
    expected = list(
        load_predictor(unchanged.storage, "colours", unchanged.config).answer(
            [picture("warm", 100), picture("cold", 101)]
        )
    )
    response = client.post("/predict", json=as_json(picture_file("warm", 100), picture_file("cold", 101)))
    assert response.status_code == 200
    assert response.json()["version"] == unchanged.store.version
    for found, right in zip(response.json()["answers"], expected, strict=True):
        assert (found["class_name"], found["task"]) == (right.class_name, right.task)
        assert found["confidence"] == pytest.approx(right.confidence, abs=2e-3)  # interpolated class features
        assert found["weight"] == pytest.approx(right.weight, abs=1e-6)
        assert found["log_densities"] == pytest.approx(right.log_densities)
        assert found["top"][0] == {"class_name": found["class_name"], "confidence": found["confidence"]}
        assert {choice["class_name"] for choice in found["top"]} <= {n for names in CLASSES.values() for n in names}


def test_a_form_is_answered_as_json_is_and_images_keep_their_order(client: TestClient) -> None:
    files = [picture_file(task, seed) for seed in range(3) for task in ("warm", "cold")]
    asked = {"classes": ["a dog", "a cat"], "template": "{}!"}
    by_json = client.post("/predict", json=as_json(*files, **asked)).json()
    by_form = client.post("/predict", files=[("image", ("x", data)) for data in files], data=asked).json()
    assert by_form["version"] == by_json["version"]
    for form, plain in zip(by_form["answers"], by_json["answers"], strict=True):
        assert (form["class_name"], form["task"]) == (plain["class_name"], plain["task"])
        assert form["confidence"] == pytest.approx(plain["confidence"], abs=1e-5)
    assert [answer["task"] for answer in by_form["answers"]] == ["warm", "cold"] * 3
    for n, data in enumerate(files):
        (alone,) = client.post("/predict", json=as_json(data, **asked)).json()["answers"]
        assert alone["class_name"] == by_json["answers"][n]["class_name"]
        assert alone["confidence"] == pytest.approx(by_json["answers"][n]["confidence"], abs=1e-5)


def test_plain_clip_is_the_frozen_model_among_the_same_classes(unchanged: StoredRun, client: TestClient) -> None:
    names = ["a dog", "a cat", "a tree"]
    response = client.post("/predict", json=as_json(picture_file("warm", 3), classes=names, template="{}?"))
    (found,) = response.json()["answers"]
    backbone = unchanged.backbone
    image = backbone.encode_image(backbone.preprocess(picture("warm", 3))[None])
    confidence = backbone.logits(image, backbone.encode_text(backbone.tokenize(names, "{}?"))).softmax(1)[0]
    plain = {choice["class_name"]: choice["confidence"] for choice in found["plain_clip"]}
    assert plain == pytest.approx(dict(zip(names, confidence.tolist(), strict=True)), abs=1e-5)


def questions(snapshots: Snapshots, *tasks: str) -> list[Question]:
    """One question a task, alternately among the classes learnt and two others."""
    snapshot = snapshots.current
    other = (snapshots.vocabularies.named(["a dog", "a cat"], "{}"),)
    preprocess = snapshot.predictor.backbone.preprocess
    return [
        Question(preprocess(picture(task, n)), snapshot, other if n % 2 else snapshot.learnt, FAR)
        for n, task in enumerate(tasks)
    ]


def test_an_answer_does_not_depend_on_what_shares_its_pass_or_was_asked_before(run: StoredRun) -> None:
    """Among others: questions under a snapshot that is no longer current, in one pass with those under the next."""
    settings = Settings(storage=run.storage, run="colours", backbone=run.config.backbone.name)
    snapshots = Snapshots(settings)
    before = questions(snapshots, "warm", "cold", "lush", "warm", "lush")
    run.learn("lush")
    assert snapshots.refresh()
    after = questions(snapshots, "warm", "cold", "lush", "warm", "lush")
    mixed = [q for pair in zip(before, after, strict=True) for q in pair]
    together = answer_questions(mixed)
    assert [a.task for a in together[1::2]] == ["warm", "cold", "lush", "warm", "lush"]
    assert not any("lush" in a.log_densities for a in together[0::2])
    for question, answer in zip(mixed, together, strict=True):
        predictor = replace(question.snapshot.predictor, class_features=Tabulated(settings.text_grid))  # nothing kept
        unasked = replace(question, snapshot=replace(question.snapshot, predictor=predictor))
        (alone,) = answer_questions([unasked])
        assert (alone.class_name, alone.task) == (answer.class_name, answer.task)
        assert alone.confidence == pytest.approx(answer.confidence, abs=1e-5)
        assert alone.weight == pytest.approx(answer.weight, abs=1e-6)


def test_nobody_is_answered_whose_time_is_over(service: Service) -> None:
    (question,) = questions(model_of(service).snapshots, "warm")
    late = Question(question.pixels, question.snapshot, question.candidates, time.monotonic() - 1)
    first, second = answer_questions([late, question])
    assert first is None
    assert second is not None


# Following the run


def test_a_task_learnt_or_removed_later_is_served_without_a_restart(run: StoredRun) -> None:
    service = service_of(run)
    client = TestClient(build_app(service))
    lush = as_json(picture_file("lush", 200))
    first = client.post("/predict", json=lush).json()
    assert set(first["answers"][0]["log_densities"]) <= {"warm", "cold"}

    version = run.learn("lush")
    assert client.post("/predict", json=lush).json() == first  # until it is looked at
    assert model_of(service).snapshots.refresh()
    second = client.post("/predict", json=lush).json()
    assert second["version"] == version > first["version"]
    assert second["answers"][0]["task"] == "lush"
    assert [task["name"] for task in client.get("/tasks").json()["tasks"]] == ["warm", "cold", "lush"]

    run.store.remove_task(run.epoch, "lush")
    model_of(service).snapshots.refresh()
    third = client.post("/predict", json=lush).json()
    assert third["answers"] == first["answers"]
    assert third["version"] == run.store.version


def test_the_run_is_followed_in_the_background(run: StoredRun) -> None:
    snapshots = Snapshots(
        Settings(storage=run.storage, run="colours", backbone=run.config.backbone.name, refresh_s=0.05)
    )
    snapshots.follow()
    try:
        version = run.learn("lush")
        deadline = time.monotonic() + 60
        while snapshots.current.version != version:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert snapshots.current.tasks == ("warm", "cold", "lush")
    finally:
        snapshots.close()


def test_a_damaged_module_or_lost_storage_leaves_the_former_tasks_served(run: StoredRun) -> None:
    service = service_of(run)
    client = TestClient(build_app(service))
    before = client.post("/predict", json=as_json(picture_file("warm", 1))).json()
    run.learn("lush")
    (blob,) = [p for p in Path(run.storage).rglob("*.safetensors") if p.stem == run.store.modules()[-1].digest]
    good = blob.read_bytes()
    blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert not model_of(service).snapshots.refresh()
    assert client.get("/tasks").json()["stale_since"] == pytest.approx(time.time(), abs=60)
    assert client.post("/predict", json=as_json(picture_file("warm", 1))).json() == before
    assert "diki_serve_stale{" in client.get("/metrics").text
    blob.write_bytes(good)
    assert model_of(service).snapshots.refresh()
    assert client.get("/tasks").json()["stale_since"] is None
    os.rename(run.storage, run.storage + ".away")
    model_of(service).snapshots.refresh()
    assert model_of(service).snapshots.current.tasks == ("warm", "cold", "lush")


def test_a_run_whose_last_task_was_removed_answers_among_given_classes_only(run: StoredRun) -> None:
    service = service_of(run)
    client = TestClient(build_app(service))
    for task in ("warm", "cold"):
        run.store.remove_task(run.epoch, task)
    model_of(service).snapshots.refresh()
    refused = client.post("/predict", json=as_json(picture_file("warm", 1)))
    assert (refused.status_code, "no task at present" in refused.json()["error"]) == (422, True)
    (found,) = client.post("/predict", json=as_json(picture_file("warm", 1), classes=["a", "b"])).json()["answers"]
    assert (found["task"], found["log_densities"]) == (None, {})
    assert found["top"] == found["plain_clip"]


# Who may ask


def test_a_token_is_asked_for_but_by_the_page_and_the_health_check(service: Service) -> None:
    client = limited(service, token_sha256=token_digest_of(TOKEN))
    image = as_json(picture_file("warm", 1))
    for headers in (
        {},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer " + token_digest_of(TOKEN)},
        {"Authorization": b"Bearer \xff"},
    ):
        for method, path in (("POST", "/predict"), ("GET", "/tasks"), ("GET", "/metrics"), ("GET", "/openapi.json")):
            response = client.request(method, path, json=image, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/healthz", headers={}).json() == {"status": "ok"}
        assert client.get("/").status_code == 200
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert client.post("/predict", json=image, headers=right).status_code == 200
    for path in ("/tasks", "/metrics", "/openapi.json"):
        told = client.get(path, headers=right)
        assert told.status_code == 200
        assert TOKEN not in told.text
        assert token_digest_of(TOKEN) not in told.text


def token_digest_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def test_no_server_starts_without_a_token_unless_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIKI_SERVE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"a server needs a token.*--no-token"):
        token_digest(None, no_token=False)
    assert token_digest(None, no_token=True) is None
    file = tmp_path / "token"
    for content, said in (("", "needs a token"), ("short", "at least 16"), ("with spaces " * 4, "without spaces")):
        file.write_text(content)
        with pytest.raises(ConfigError, match=said):
            token_digest(str(file), no_token=False)
    with pytest.raises(ConfigError, match="cannot be read"):
        token_digest(str(tmp_path / "none"), no_token=False)
    with pytest.raises(ConfigError, match="contradict"):
        token_digest(str(file), no_token=True)
    file.write_text(TOKEN + "\n")
    monkeypatch.setenv("DIKI_SERVE_TOKEN", TOKEN)
    assert token_digest(str(file), no_token=False) == token_digest(None, no_token=False) == token_digest_of(TOKEN)


# Time and load


def test_a_body_that_does_not_come_and_an_answer_that_does_not_are_told_apart(service: Service) -> None:
    said = []

    async def never() -> dict[str, object]:
        await asyncio.sleep(60)
        return {}

    async def send(message: dict[str, object]) -> None:
        said.append(message.get("status"))

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": headers}
    asyncio.run(limited(service, request_timeout_s=0.3).app(scope, never, send))
    assert said[0] == 408

    class Forever(LoadedModel):
        def __init__(self) -> None:
            vars(self).update(vars(service.model))

        def ask(self, *_: object) -> list[Future[Answered | None]]:
            return [Future()]

    late = limited(service, Forever(), request_timeout_s=0.5).post("/predict", json=as_json(picture_file("warm", 1)))
    assert (late.status_code, late.json()["error"]) == (504, "there was no answer within 0.5 s.")


def test_more_images_than_may_wait_are_sent_away(service: Service) -> None:
    client = limited(service, max_waiting_images=1)
    response = client.post("/predict", json=as_json(picture_file("warm", 1), picture_file("warm", 2)))
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert client.post("/predict", json=as_json(picture_file("warm", 1))).status_code == 200


def test_class_features_are_kept_up_to_a_number_of_bytes() -> None:
    cache = FeatureCache(max_bytes=3 * 40)
    for n in (0, 1, 2, 0, 3):
        cache.get(("", "x", n), lambda n=n: torch.full((10,), float(n)))
    assert cache.num_bytes == 3 * 40
    kept = [cache.get(("", "x", n), lambda: torch.full((10,), -1.0))[0].item() for n in (0, 2, 3, 1)]
    assert kept == [0.0, 2.0, 3.0, -1.0]  # 1 was the longest unused


def test_vocabularies_of_strangers_drive_nothing_out_and_leave_nothing_behind(unchanged: StoredRun) -> None:
    service = service_of(unchanged, named_cache_bytes=20_000)
    client = TestClient(build_app(service))
    image = picture_file("warm", 1)
    expected = client.post("/predict", json=as_json(image)).json()
    snapshots = model_of(service).snapshots
    learnt, words = snapshots.class_features.kept.num_bytes, len(snapshots.backbone.tokenizer.cache)
    for n in range(100):
        names = [f"strange{n}x{k}" for k in range(5)]
        assert client.post("/predict", json=as_json(image, classes=names)).status_code == 200
    assert len(snapshots.vocabularies._kept) <= 64
    assert 0 < snapshots.class_features.passing.num_bytes <= 20_000
    assert snapshots.class_features.kept.num_bytes == learnt > 0
    assert len(snapshots.backbone.tokenizer.cache) == words
    assert client.post("/predict", json=as_json(image)).json() == expected
    service.close()


# What is told


def test_metrics_count_what_happened_and_replicas_are_told_apart(unchanged: StoredRun) -> None:
    service = service_of(unchanged)
    client = TestClient(build_app(service))
    client.post("/predict", json=as_json(picture_file("warm", 1), picture_file("cold", 1)))
    client.post("/predict", json={})
    client.get("/no/such/route/0123")
    collected = asyncio.run(service.collected())
    text = exposition({"a": collected, "b": collected}).decode()
    values = {
        (s.name, *sorted(s.labels.items())): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }
    for replica in ("a", "b"):
        of = ("replica", replica)
        assert values[("diki_serve_images_total", of, ("task", "warm"))] == 1
        assert values[("diki_serve_requests_total", of, ("route", "/predict"), ("status", "200"))] == 1
        assert values[("diki_serve_requests_total", of, ("route", "/predict"), ("status", "422"))] == 1
        assert values[("diki_serve_requests_total", of, ("route", "other"), ("status", "404"))] == 1
        assert values[("diki_serve_refused_requests_total", ("reason", "fields"), of)] == 1
        assert values[("diki_serve_tasks", of)] == 2
        assert values[("diki_serve_waiting_images", of)] == 0
    assert "such/route" not in text  # its digits alone are in a time now and then
    service.close()


def test_the_openapi_document_says_both_forms_and_every_status(service: Service) -> None:
    client = limited(service, token_sha256=token_digest_of(TOKEN))
    document = client.get("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    assert set(document["paths"]) == {"/healthz", "/metrics", "/predict", "/tasks"}
    predict = document["paths"]["/predict"]["post"]
    assert set(predict["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert set(predict["responses"]) == {"200", "400", "401", "408", "413", "415", "422", "500", "503", "504"}
    assert predict["security"] == [{"token": []}]
    assert "security" not in document["paths"]["/healthz"]["get"]
    assert client.get("/docs").status_code == 401
    assert TestClient(build_app(service)).get("/docs").status_code == 404


def test_the_page_needs_nothing_from_elsewhere_and_lets_nothing_else_run(client: TestClient) -> None:
    response = client.get("/")
    assert response.headers["content-security-policy"] == POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in POLICY
    assert set(re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', PAGE)) == {"data:,"}
    assert not re.search(r"\bon\w+\s*=\s*[\"']|\bstyle\s*=|url\(|@import|innerHTML", PAGE)


def test_frozen_answers_come_below_skip_weight(tmp_path: Path) -> None:
    run = StoredRun(tmp_path, "warm", "cold")
    config = run.config.model_copy(update={"evaluate": run.config.evaluate.model_copy(update={"skip_weight": 1.0})})
    run.store.put_document(run.epoch, "config.yaml", config.to_yaml())
    settings = Settings(storage=run.storage, run="colours", backbone=run.config.backbone.name)
    snapshots = Snapshots(settings)
    for answer in answer_questions(questions(snapshots, "warm", "cold")):
        assert answer.task is None
        assert answer.top == answer.plain_clip
