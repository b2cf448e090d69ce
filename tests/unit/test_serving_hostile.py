"""What strangers may send: whatever it is, the answer is a 4xx, and the next honest request is answered as ever."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from stored_run import StoredRun, as_json, file_of, picture, picture_file

from diki_ray.serving.app import Service, build_app
from diki_ray.serving.loaded_model import LoadedModel
from diki_ray.serving.settings import Settings

FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
GOOD = picture_file("warm", 1)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    run = StoredRun(tmp_path_factory.mktemp("run"), "warm", "cold")
    limits = {"max_body_bytes": 200_000, "max_images": 3, "max_classes": 4, "max_pixels": 10_000}
    settings = Settings(storage=run.storage, run="colours", backbone=run.config.backbone.name, **limits)
    service = Service(settings, LoadedModel(settings))
    with TestClient(build_app(service)) as client:
        expected = client.post("/predict", json=as_json(GOOD)).json()
        yield client
        assert client.post("/predict", json=as_json(GOOD)).json() == expected
    service.close()


def refused(response: Any, status: int, said: str = "") -> None:
    assert response.status_code == status, response.text
    assert said in response.json()["error"]
    assert len(response.text) < 2000


def png(width: int, height: int) -> bytes:
    """A PNG of these dimensions in a few bytes, whose pixels are not there or are all one colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(b"\0" * ((width // 8 + 2) * height)) if width * height < 10**7 else b""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "images[0] cannot be used: not an image"),
        (b"words", "not an image"),
        (GOOD[: len(GOOD) // 2], "truncated image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (png(60_000, 60_000), "too many pixels"),
        (png(101, 100), "too many pixels"),
        (png(9_999, 1), "9999x1 pixels is too long and thin"),
        (png(0, 5), "images[0] cannot be used"),
    ],
    ids=["empty", "words", "truncated", "program", "bomb", "just too large", "line", "no pixels"],
)
def test_an_image_that_cannot_be_used_is_said_so(client: TestClient, data: bytes, said: str) -> None:
    refused(client.post("/predict", json=as_json(data)), 422, said)
    refused(client.post("/predict", files=[("image", ("x", data))]), 422, said)
    refused(client.post("/predict", json=as_json(GOOD, data)), 422, said.replace("[0]", "[1]"))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_formats_of_images_are_answered(client: TestClient, image_format: str) -> None:
    data = file_of(picture("cold", 5), image_format)
    assert client.post("/predict", json=as_json(data)).json()["answers"][0]["task"] == "cold"


def test_an_image_is_turned_upright_and_a_single_pixel_is_one(client: TestClient) -> None:
    image = Image.new("RGB", (40, 80), "red")
    image.paste("blue", (0, 0, 40, 30))
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    out = client.post("/predict", json=as_json(file_of(image), _exif(turned, exif))).json()["answers"]
    assert out[0]["log_densities"] == pytest.approx(out[1]["log_densities"])
    assert client.post("/predict", json=as_json(file_of(Image.new("L", (1, 1))))).status_code == 200


def _exif(image: Image.Image, exif: Image.Exif) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", exif=exif)
    return out.getvalue()


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b'{"images": ["\\ud800"]}', 400, "not JSON"),
        (b"[" * 500, 400, "not JSON"),
        (b"[" * 50_000, 422, "more lists and values"),
        (b'{"images": ["' + b"\xff" * 9 + b'"]}', 400, "not JSON"),
        (b"null", 422, "object"),
        (b"{}", 422, "images: Field required"),
        (b'{"images": []}', 422, "images: "),
        (b'{"images": "x"}', 422, "images: "),
        (b'{"images": [1, null, {}]}', 422, "images.0: "),
        (b'{"images": ["***"]}', 422, "images[0] is not base64"),
        (b'{"images": ["\xc3\xa9"]}', 422, "images[0] is not base64"),
        (b'{"images": ["", "", "", ""]}', 422, "4 images are too many: at most 3"),
        (b'{"images": [""], "class": ["a"]}', 422, "class: Extra inputs"),
        (b'{"images": [""], "classes": []}', 422, "classes: "),
        (b'{"images": [""], "classes": ["a", " "]}', 422, "classes.1: "),
        (b'{"images": [""], "classes": ["a", "a "]}', 422, "named twice"),
        (b'{"images": [""], "classes": ["' + b"x" * 101 + b'"]}', 422, "classes.0: "),
        (b'{"images": [""], "classes": ["a", "b", "c", "d", "e"]}', 422, "5 classes are too many: at most 4"),
        (b'{"images": [""], "classes": {"a": 1}}', 422, "classes: "),
        (b'{"images": [""], "classes": [NaN]}', 422, "classes.0: "),
        (b'{"images": [""], "template": "a {}"}', 422, "a template is for classes that you give"),
        (b'{"' + b'": 1, "'.join(b"%d" % n for n in range(250)) + b'": 1}', 422, "251 mistakes"),
        (b'{"' + b'": 1, "'.join(b"%d" % n for n in range(5000)) + b'": 1}', 422, "more lists and values"),
        (b'{"images": [' + b"9" * 150_000 + b"]}", 400, "not JSON"),
    ],
)
def test_wrong_json_is_said_to_be(client: TestClient, body: bytes, status: int, said: str) -> None:
    refused(client.post("/predict", content=body, headers={"Content-Type": "application/json"}), status, said)


@pytest.mark.parametrize(
    "template", ["", "none", "{} {}", "{0}", "{} {0.__class__}", "{:>999999999}", "{x}", "{} }", "{", "{}{", "x" * 201]
)
def test_a_template_has_one_place_and_is_no_program(client: TestClient, template: str) -> None:
    refused(client.post("/predict", json=as_json(GOOD, classes=["a"], template=template)), 422, "template: ")


@pytest.mark.parametrize(
    "name", ["{}", "{0.__class__}", "<end_of_text>", "<script>", "\0", "\u202e", "🦊" * 20, "&lt;" * 20, "a" * 100]
)
def test_a_class_may_have_any_name(client: TestClient, name: str) -> None:
    found = client.post("/predict", json=as_json(GOOD, classes=[name, "other"])).json()["answers"][0]
    assert {choice["class_name"] for choice in found["top"]} == {name, "other"}


def test_wrong_forms_are_said_to_be(client: TestClient) -> None:
    image = ("image", ("x.png", GOOD))
    refused(client.post("/predict", files=[("classes", ("x", b"a"))]), 422, "the form has 'classes'")
    refused(client.post("/predict", files=[image, ("other", (None, b"1"))]), 422, "the form has 'other'")
    refused(client.post("/predict", files=[image, *[("template", (None, b"{}"))] * 2]), 422, "template (once)")
    refused(client.post("/predict", files=[("classes", (None, b"a"))]), 422, "no file named image")
    refused(client.post("/predict", files=[image] * 4), 400, "Too many files")
    refused(client.post("/predict", files=[image, *[("classes", (None, b"a"))] * 9]), 400, "Too many fields")
    refused(client.post("/predict", files=[image, ("classes", (None, b"a" * 5000))]), 400)
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x", "multipart/form-data; boundary="):
        refused(client.post("/predict", content=b"words", headers={"Content-Type": kind}), 400)
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "application/json5", "\xff"):
        headers = {"Content-Type": kind.encode("latin-1")}
        refused(client.post("/predict", content=b"image=1", headers=headers), 415, "send multipart/form-data")


def test_a_body_that_is_too_large_is_not_read(client: TestClient) -> None:
    large = as_json(b"\0" * 200_000)
    refused(client.post("/predict", json=large), 413, "at most 200000 bytes")
    refused(client.post("/predict", files=[("image", ("x", b"\0" * 200_000))]), 413)
    json_kind = {"Content-Type": "application/json"}
    refused(client.post("/predict", content=b"1", headers={**json_kind, "Content-Length": "9" * 5000}), 413)

    def without_a_length() -> Iterator[bytes]:
        for _ in range(400):
            yield b" " * 1000

    refused(client.post("/predict", content=without_a_length(), headers=json_kind), 413)
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    refused(client.post("/predict", content=without_a_length(), headers=form), 413)


@FEW
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"]),
    path=st.sampled_from(["/predict", "/predict/", "/tasks", "/metrics", "/openapi.json", "/healthz", "/", "/-/x"])
    | st.text(st.characters(codec="ascii", exclude_characters="?#"), max_size=20).map("/".__add__),
)
def test_no_route_and_no_method_breaks_it(client: TestClient, method: str, path: str) -> None:
    assert client.request(method, quote(path)).status_code < 500


@FEW
@given(
    data=st.binary(max_size=300)
    | st.integers(0, len(GOOD) - 1).flatmap(
        lambda n: st.integers(0, 255).map(lambda byte: GOOD[:n] + bytes([byte]) + GOOD[n + 1 :])
    )
)
def test_no_bytes_as_an_image_break_it(client: TestClient, data: bytes) -> None:
    assert client.post("/predict", json=as_json(data)).status_code in (200, 422)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELD = JSON | st.just(base64.b64encode(GOOD).decode()) | st.just([base64.b64encode(GOOD).decode()])


@FEW
@given(
    body=st.fixed_dictionaries({}, optional={"images": FIELD, "classes": JSON | st.just(["a", "b"]), "template": JSON})
    | JSON
)
def test_no_json_breaks_it(client: TestClient, body: Any) -> None:
    sent = client.post("/predict", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert sent.status_code in (200, 400, 422)


@FEW
@given(
    body=st.lists(
        st.sampled_from(
            [
                *(b"--x", b"--x--", b"\r\n", b"\n", b"\r\n\r\n", b'Content-Disposition: form-data; name="image"', GOOD),
                *(b'; filename="a"', b"; filename*=utf-8''%ff", b'name="classes"', b"a", b"\xff\0", b":", b";"),
                *(b"Content-Type: text/plain; charset=nonsense", b"Content-Transfer-Encoding: base64"),
            ]
        ),
        max_size=14,
    ).map(b"".join),
    kind=st.sampled_from(["boundary=x", 'boundary="x"', "boundary=x; charset=what", "boundary=\xff", "charset=utf-7"]),
)
def test_no_form_breaks_it(client: TestClient, body: bytes, kind: str) -> None:
    headers = {"Content-Type": f"multipart/form-data; {kind}".encode("latin-1")}
    assert client.post("/predict", content=body, headers=headers).status_code in (200, 400, 422)
