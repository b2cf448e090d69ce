"""A request's bytes become images and what is asked of them. Everything here was sent by somebody who may mean harm:
whatever it is, the outcome is a request or a Refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from diki_ray.data.images import UndecodableImageError
from diki_ray.serving.decoding import Decoder, DecodingTooSlowError
from diki_ray.serving.schema import MAX_NAME_LENGTH, MAX_TEMPLATE_LENGTH, Asked, PredictRequest
from diki_ray.serving.settings import Settings

_MAX_PROBLEMS = 5


class Refusal(Exception):
    """A request that is not answered: a 4xx status, one sentence, and a short reason fit for counting."""

    def __init__(self, status: int, sentence: str, reason: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.reason = reason


def from_json(body: bytes, settings: Settings) -> tuple[list[bytes], Asked]:
    """Returns the image files and the question of a JSON body."""
    _check_values(body, settings)
    try:
        request = PredictRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refused(error) from None
    _check_counts(len(request.images), request, settings)
    try:
        return request.decoded(), request
    except ValueError as error:
        raise Refusal(422, f"{error}.", "base64") from None


async def from_form(form: FormData, settings: Settings) -> tuple[list[bytes], Asked]:
    """Returns the image files and the question of a multipart body: `image` files, `classes` repeated, `template`."""
    files: list[bytes] = []
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name == "image" and isinstance(value, UploadFile):
            files.append(await value.read())
        elif name == "classes" and isinstance(value, str):
            fields.setdefault("classes", []).append(value)
        elif name == "template" and isinstance(value, str) and name not in fields:
            fields["template"] = value
        else:
            shown = ascii(name)[:80]
            raise Refusal(
                422,
                f"the form has {shown} where there are: image (files), classes (one name each), template (once).",
                "fields",
            )
    if not files:
        raise Refusal(422, "the form has no file named image.", "fields")
    try:
        asked = Asked.model_validate(fields)
    except ValidationError as error:
        raise _refused(error) from None
    _check_counts(len(files), asked, settings)
    return files, asked


def to_pixels(
    data: bytes, where: str, decoder: Decoder, preprocessed: Callable[[bytes, int, int], bytes], settings: Settings
) -> bytes:
    """Returns an image file as the model takes it: the RGB bytes of a square of the decoder's size, or what
    `preprocessed` makes of any other image."""
    try:
        decoded = decoder.decode(data, settings.max_pixels)
    except DecodingTooSlowError:
        slow = f"decoding it took more than {settings.decode_timeout_s:g} s"
        raise Refusal(422, f"{where} cannot be used: {slow}.", "slow image") from None
    except UndecodableImageError as error:
        raise Refusal(422, f"{where} cannot be used: {error.reason}.", error.reason) from None
    width, height = decoded.width, decoded.height
    if max(width, height) > settings.max_aspect_ratio * min(width, height):
        raise Refusal(
            422,
            f"{where} cannot be used: {width}x{height} pixels is too long and thin.",
            "aspect ratio",
        )
    size = decoder.size_px
    return decoded.rgb if decoded.size == (size, size) else preprocessed(decoded.rgb, *decoded.size)


def _check_values(body: bytes, settings: Settings) -> None:
    """Refuses JSON of more values than a request can have, before any is made an object or its mistake is told.

    Each value but the first comes after one of these characters. Base64 has none of them, so that only names and the
    template could have them too, and their lengths are limited.
    """
    in_texts = settings.max_classes * MAX_NAME_LENGTH + MAX_TEMPLATE_LENGTH
    at_most = settings.max_images + settings.max_classes + in_texts + 16
    read = np.frombuffer(body, np.uint8)
    if sum(np.count_nonzero(read == character) for character in b",[{:") > at_most:
        raise Refusal(422, "the body has more lists and values than a request can have.", "counts")


def _check_counts(num_images: int, asked: Asked, settings: Settings) -> None:
    if num_images > settings.max_images:
        raise Refusal(422, f"{num_images} images are too many: at most {settings.max_images} a request.", "counts")
    if asked.classes is not None and len(asked.classes) > settings.max_classes:
        raise Refusal(
            422, f"{len(asked.classes)} classes are too many: at most {settings.max_classes} a request.", "counts"
        )
    if asked.template is not None and asked.classes is None:
        raise Refusal(422, "a template is for classes that you give: those learnt have their own.", "fields")


def _refused(error: ValidationError) -> Refusal:
    if error.error_count() > 100:  # each costs memory to tell
        return Refusal(422, f"the request has {error.error_count()} mistakes.", "fields")
    found = error.errors(include_url=False, include_context=False, include_input=False)
    if found[0]["type"] == "json_invalid":
        return Refusal(400, "the body is not JSON.", "json")
    return Refusal(422, _sentence(found), "fields")


def _sentence(found: Sequence[Any]) -> str:
    sentences = [f"{_place(e['loc'])}{e['msg'].removeprefix('Value error, ')}" for e in found[:_MAX_PROBLEMS]]
    return "; ".join(sentences) + "."


def _place(location: tuple[int | str, ...]) -> str:
    place = ".".join(str(part)[:60] for part in location)
    return f"{place}: " if place else ""


def request_body(settings: Settings) -> dict[str, Any]:
    """Returns what the OpenAPI document says of both forms of a request."""
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    form = Asked.model_json_schema()
    form["properties"] = {
        "image": {"type": "array", "items": file, "minItems": 1, "maxItems": settings.max_images},
        **form["properties"],
    }
    form["required"] = ["image"]
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": form},
            "application/json": {"schema": PredictRequest.model_json_schema()},
        },
    }
