"""A site's part of a task: the sums by class of its images' frozen features, in a file that holds no image.

Parts of sites that never see each other's images add up to the sums of all images together, to the bit and in any
order (learning/statistics.py). A part comes from elsewhere, so everything in it is checked where it is read.

Shapes: C classes, E embedding dimensions, N images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from diki_ray.config.templates import template_fault
from diki_ray.errors import CorruptError
from diki_ray.learning.module import read_tensors, write_tensors
from diki_ray.learning.statistics import GRID, Statistics

MOST_IMAGES = 2**22
"""Images of a part: as many as sums of features of norm 1 can count for certain."""
NORM_TOLERANCE = 1e-3
"""The mean squared norm of a part's features is at most this far from 1. The rounding to multiples of 1 / GRID moves it
(by less than 1e-4 at 1,024 dimensions)."""

_Text = Annotated[str, Field(min_length=1, max_length=4096)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=1, lt=2**31)]


class MadeWith(BaseModel):
    """What changes the last bits of features, and not what they mean."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    device: _Text
    batch_size: _Count
    num_threads: _Count
    torch: _Text
    diki_ray: _Text


class PartHeader(BaseModel):
    """What a part says of its sums. `backbone` is the digest of the weights and of the image preprocessing, `data` that
    of the training images; no class of the part has fewer than `min_count` images, unless it has none."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    site_part: Literal[1] = 1
    """The format."""
    task: _Text
    class_names: Annotated[tuple[_Text, ...], Field(min_length=1)]
    templates: Annotated[tuple[_Text, ...], Field(min_length=1)]
    backbone: _Digest
    precision: Annotated[str, Field(pattern=r"^torch\.(float32|bfloat16)$")]
    data: _Digest
    min_count: _Count
    made_with: MadeWith

    @field_validator("class_names")
    @classmethod
    def _differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a class is named twice")
        return value

    @field_validator("templates")
    @classmethod
    def _are_templates(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for template in value:
            if (fault := template_fault(template)) is not None:
                raise ValueError(f"a template {fault}")
        return value


@dataclass(frozen=True, eq=False)
class SitePart:
    """One site's sums of a task with what they are of."""

    header: PartHeader
    statistics: Statistics

    @cached_property
    def content(self) -> str:
        """sha256 of the sums and of the names of their classes: the part's name, whatever its file is called."""
        return _sha256(self.header.class_names, self.statistics.tensors())

    def to_bytes(self) -> bytes:
        """One safetensors blob with a checksum; the same part gives the same bytes."""
        header = self.header.model_dump(mode="json")
        tensors = self.statistics.tensors()
        return write_tensors(header | {"checksum": _sha256(header, tensors)}, tensors)

    @staticmethod
    def from_bytes(blob: bytes) -> SitePart:
        """Raises CorruptError when the blob is not a part, was damaged, or holds sums that no images have."""
        header, tensors = read_tensors(blob)
        try:
            checksum = header.pop("checksum", None)
            if header.get("site_part") != 1:
                raise ValueError(f"its format is {header.get('site_part')!r}, and this version reads 1")
            if set(tensors) != {"counts", "first", "second"} or checksum != _sha256(header, tensors):
                raise ValueError("it does not have the checksum it was written with: have it sent again")
            checked = PartHeader.model_validate_json(json.dumps(header))
            statistics = Statistics.from_tensors(tensors)
            if len(statistics.counts) != len(checked.class_names):
                raise ValueError(
                    f"it has sums of {len(statistics.counts)} classes, and names {len(checked.class_names)}"
                )
            _check_sums(statistics, checked.min_count)
        except ValidationError as error:
            first = error.errors()[0]
            raise CorruptError(f"it is no site's part: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except (ValueError, AttributeError, TypeError) as error:
            raise CorruptError(f"it is no site's part: {error}") from None
        return SitePart(checked, statistics)


def _sha256(about: Any, tensors: Mapping[str, np.ndarray]) -> str:
    """Over JSON values, and arrays with their names, types and shapes."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, array in sorted(tensors.items()):
        found.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _check_sums(statistics: Statistics, min_count: int) -> None:
    """Raises ValueError for what no N images with features of norm 1 add up to."""
    counts, first, squares = statistics.counts, statistics.first, statistics.second.diagonal()
    if (counts > MOST_IMAGES).any() or not 0 < (n := statistics.count) < MOST_IMAGES:
        raise ValueError(f"a part has between 1 and {MOST_IMAGES:,} images")
    if ((counts > 0) & (counts < min_count)).any():
        raise ValueError(f"a class has fewer images than the {min_count} that the part says each has")
    largest = counts[:, None] * int(GRID)
    in_range = (np.abs(first.astype(np.float64)) <= largest).all() and (squares >= 0).all()
    if not in_range or abs(squares.astype(np.float64).sum() / GRID**2 / n - 1) > NORM_TOLERANCE:
        raise ValueError("its sums are not of features of norm 1")
    # What is added up must stay a covariance: a negative variance would be met only when images are answered.
    if np.linalg.eigvalsh(statistics.scatter_within).min() < -1e-9 * n:
        raise ValueError("its sums have a negative variance, which no images have")
