"""What a setting affects. Each field of a run's configuration says it once, in its type:

    lr: ChangesModule[float] = Field(default=5.0, gt=0)

From these marks follow a configuration's digest, a module's key and provenance, a sweep's lease and its question. A
field without a mark is an error as soon as one of them is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo


class Affects(Enum):
    """The values are the words that docs/configuration.md uses."""

    MODULE = "modules"
    """Another value trains another module, under another key."""
    ANSWER = "answers"
    """Another value gives other results with the same modules: the run is evaluated anew and nothing is trained."""
    NOTHING = "nothing"
    """Where, when and how fast, up to rounding: nothing is computed anew and no result is forgotten."""


@dataclass(frozen=True)
class StoredAs:
    """A second mark: digests, keys and provenance know the field under another field's name, as they did before there
    was this one, and have that field's value where this one is not set."""

    name: str


@dataclass(frozen=True)
class AddedLater:
    """A second mark: a field that came after modules had been stored. Keys and provenance do not know it where it has
    its default value, as they did not before there was it."""


T = TypeVar("T")
ChangesModule = Annotated[T, Affects.MODULE]
ChangesAnswers = Annotated[T, Affects.ANSWER]
ChangesNothing = Annotated[T, Affects.NOTHING]


def affects(field: FieldInfo) -> Affects | None:
    """What the field's mark says; None where it has none."""
    return next((mark for mark in field.metadata if isinstance(mark, Affects)), None)


def settings(section: BaseModel, *wanted: Affects, defaults: bool = True) -> dict[str, Any]:
    """The fields of a section, and of the sections in it, that affect what is wanted.

    defaults: False leaves out the fields that have their default value, and the sections in which nothing is left.

    Raises:
        TypeError: a field does not say what it affects.
    """
    found: dict[str, Any] = {}
    fields = type(section).model_fields
    for own_name, field in fields.items():
        value, mark = getattr(section, own_name), affects(field)
        name = next((m.name for m in field.metadata if isinstance(m, StoredAs)), own_name)
        value = getattr(section, name) if value is None else value
        if isinstance(value, BaseModel):
            inner = settings(value, *wanted, defaults=defaults)
            if inner or defaults:
                found[name] = inner
        elif mark is None:
            raise TypeError(
                f"{type(section).__name__}.{own_name} does not say what it affects: write its type as "
                "ChangesModule[…], ChangesAnswers[…] or ChangesNothing[…]"
            )
        elif mark in wanted and (_always_known(field, defaults) or value != fields[name].get_default()):
            found[name] = _plain(value, wanted, defaults)
    return found


def _always_known(field: FieldInfo, defaults: bool) -> bool:
    """Whether the field is said also where it has its default value."""
    return defaults and not any(isinstance(m, AddedLater) for m in field.metadata)


def _plain(value: Any, wanted: tuple[Affects, ...], defaults: bool) -> Any:
    """The value of a field, with the sections of a list as their fields."""
    if isinstance(value, tuple):
        return [settings(v, *wanted, defaults=defaults) if isinstance(v, BaseModel) else v for v in value]
    return value
