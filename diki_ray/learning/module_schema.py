"""What a stored module must be, beyond being readable: whoever writes a blob can also name it by its checksum.

Shapes: E embedding dimensions, C classes, M validation features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from diki_ray.config.templates import template_fault

_Text = Annotated[str, Field(min_length=1, max_length=4096)]


class ModuleHeader(BaseModel):
    """The JSON header of a module of either format. Fields of a later version are let be."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    format: Literal[1, 2]
    key: _Text
    task: _Text
    class_names: Annotated[list[_Text], Field(min_length=1)]
    templates: Annotated[list[str], Field(min_length=1)]
    method: _Text
    count: Annotated[int, Field(ge=0, lt=2**53)]
    provenance: dict[str, Any]

    @field_validator("templates")
    @classmethod
    def _are_templates(cls, value: list[str]) -> list[str]:
        for template in value:
            if (fault := template_fault(template)) is not None:
                raise ValueError(f"a template {fault}")
        return value


def check_header(header: Any) -> None:
    """Raises ValueError naming the first field that no module has so."""
    try:
        ModuleHeader.model_validate(header)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'its header'}: {first['msg']}") from None


def check_tensors(tensors: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError for an array with what is not finite, for parameters that are not float32, and for moments or
    validation features of other shapes than [E], [E (E + 1) / 2] and [M, E]."""
    for name, array in tensors.items():
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise ValueError(f"{name} has values that are not finite numbers")
        if name.startswith("parameters/") and array.dtype.kind == "f" and array.dtype.itemsize < 4:
            raise ValueError(f"{name} is {array.dtype}, and parameters are float32 or finer")
    validation = tensors["validation_features"]
    if validation.ndim != 2:
        raise ValueError(f"validation_features has shape {validation.shape}, and should be [M, E]")
    if (mean := tensors.get("moments/mean")) is not None:
        check_moments(mean, tensors["moments/scatter_packed"], validation)


def check_moments(mean: np.ndarray, packed: np.ndarray, validation: np.ndarray) -> None:
    """Raises ValueError where the shapes differ, or a variance is negative, which none can be."""
    e = len(mean) if mean.ndim == 1 else 0
    if not e or packed.shape != (e * (e + 1) // 2,) or validation.shape[1] != e:
        raise ValueError(f"mean {mean.shape}, scatter {packed.shape} and validation {validation.shape} do not fit")
    diagonal = packed[np.cumsum(np.arange(1, e + 1)) - 1]
    if (diagonal < 0).any():
        raise ValueError("moments/scatter_packed has a negative variance")
