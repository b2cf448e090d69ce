"""What the checkpoint of a task in training must be, beyond being whole: whoever can write one can also seal it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diki_ray.errors import CorruptError

_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Float = Annotated[float, Field(allow_inf_nan=False)]


class _Progress(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    step: _Count
    best_epoch: Annotated[int, Field(ge=-1, lt=2**53)]
    best_accuracy: _Float
    history: list[dict[str, _Float | None]]
    loss_sum: _Float
    num_correct: _Float
    num_samples: _Count
    world_sizes: list[Annotated[list[_Count], Field(min_length=2, max_length=2)]] = []


class _Header(BaseModel):
    """A checkpoint has this header; fields of a later version are let be."""

    model_config = ConfigDict(strict=True)

    progress: _Progress
    nonfinite_in_a_row: _Count
    num_nonfinite: _Count
    consumed: Annotated[int, Field(ge=0)] = 0


def check_checkpoint(
    header: Any, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """Refuses a checkpoint that no training leaves.

    shapes: of the task's parameters by name, where they are known.

    Raises:
        CorruptError: a field of another type, an array that is not finite, or other parameters than the task's.
    """
    try:
        _Header.model_validate(header)
    except ValidationError as error:
        first = error.errors()[0]
        raise not_written_here(f"{'.'.join(map(str, first['loc'])) or 'its header'}: {first['msg']}") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise not_written_here(f"{name:.200} has values that are not finite numbers")
    for kind in ("parameters", "best"):
        found = {n.removeprefix(f"{kind}/"): a.shape for n, a in arrays.items() if n.startswith(f"{kind}/")}
        if shapes is not None and found != dict(shapes):
            raise not_written_here(f"its {kind} are not those of the task")
    for name in arrays:
        if name.startswith("optimizer/") and not _is_moment(name, arrays, shapes):
            raise not_written_here(f"{name:.200} is no state of the optimizer's")


def _is_moment(name: str, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]] | None) -> bool:
    """Whether it is `optimizer/NUMBER/NAME`, of a parameter that there is and either as large or a single number."""
    parts = name.split("/")
    if len(parts) != 3 or not parts[1].isdecimal() or len(parts[1]) > 9:
        return False
    return shapes is None or (int(parts[1]) < len(shapes) and arrays[name].shape in {(), *shapes.values()})


def not_written_here(what: str) -> CorruptError:
    """The error about a checkpoint that no training wrote; `what` is wrong with it."""
    return CorruptError(
        f"a checkpoint is not what training writes ({what}): delete the task's folder below checkpoints/ in the run's "
        "storage, and the task starts anew."
    )
