"""These are requests and responses as OpenAPI shows them."""

from __future__ import annotations

import binascii
from typing import Annotated, NamedTuple

import pybase64
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

DEFAULT_TEMPLATE = "a photo of a {}."
MAX_NAME_LENGTH = 100
MAX_TEMPLATE_LENGTH = 200

ClassName = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_NAME_LENGTH)]


class Asked(BaseModel):
    """What is asked about images: nothing (all classes learnt), or classes of one's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    classes: list[ClassName] | None = Field(
        default=None, min_length=1, description="Choose among these, learnt or not; among all learnt by default."
    )
    template: str | None = Field(
        default=None,
        max_length=MAX_TEMPLATE_LENGTH,
        description=f"Caption of the classes given, with {{}} for the name; '{DEFAULT_TEMPLATE}' by default.",
    )

    @field_validator("classes")
    @classmethod
    def _distinct(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and len(set(value)) != len(value):
            raise ValueError("a class is named twice")
        return value

    @field_validator("template")
    @classmethod
    def _one_place(cls, value: str | None) -> str | None:
        # It is given to str.format: any other brace would be a field of it.
        if value is not None and (value.count("{}") != 1 or value.count("{") != 1 or value.count("}") != 1):
            raise ValueError("exactly one {} is needed, and no other brace")
        return value


class PredictRequest(Asked):
    """The JSON form of a request."""

    images: list[str] = Field(min_length=1, description="Image files (JPEG, PNG, WebP, …), each in base64.")

    def decoded(self) -> list[bytes]:
        """Raises ValueError naming the image that is not base64."""
        files = []
        for n, text in enumerate(self.images):
            try:
                files.append(pybase64.b64decode(text, validate=True))
            except (binascii.Error, ValueError):
                raise ValueError(f"images[{n}] is not base64") from None
        return files


class Choice(BaseModel):
    class_name: str
    confidence: float = Field(description="Softmax probability among the candidate classes.")


class ImageAnswer(BaseModel):
    """One image's answer, and how it came about."""

    class_name: str
    confidence: float = Field(description="Softmax probability among the candidate classes.")
    top: list[Choice] = Field(description="The five best classes, best first.")
    task: str | None = Field(description="Whose module answered; null: the frozen model alone.")
    weight: float = Field(description="Integration weight, 0 to 1: how much of the task's module was let in.")
    log_densities: dict[str, float] = Field(
        description="Of the image under each task (its classes, or one Gaussian), but for tasks ruled out early."
    )
    plain_clip: list[Choice] = Field(description="What the frozen CLIP alone would say: its five best classes.")


class Answered(NamedTuple):
    """An image's answer as it is sent: the entry of the run's log whose modules answered, the task, and the JSON of an
    ImageAnswer."""

    version: int
    task: str | None
    text: bytes


class PredictResponse(BaseModel):
    version: int = Field(description="Entry of the run's log whose modules answered, all images of the request alike.")
    answers: list[ImageAnswer] = Field(description="In the order of the images.")


class TaskInfo(BaseModel):
    name: str
    class_names: list[str]
    templates: list[str]
    digest: str = Field(description="sha256 of the task's module.")


class TasksResponse(BaseModel):
    run: str
    version: int = Field(description="Entry of the run's log up to which modules are served.")
    tasks: list[TaskInfo]
    text_grid: int = Field(description="Weights at which class features are computed; interpolated between them.")
    text_feature_error: float | None = Field(
        description="Largest absolute error of an interpolated class feature (norm 1) over the run's classes, as its "
        "evaluation measured it on the same grid and with the same modules; null: it did not."
    )
    stale_since: float | None = Field(
        description="Seconds since 1970 from which on the storage could not be read; null while it can."
    )


class Health(BaseModel):
    status: str


class Problem(BaseModel):
    error: str = Field(description="One sentence.")
