"""JSON of elsewhere: what `json` takes beyond JSON (NaN) and what makes it fail in other ways is a ValueError."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def parsed(data: bytes | str) -> Any:
    """The value that a JSON text stands for.

    Raises:
        ValueError: it is no JSON, nested too deeply, or has NaN or Infinity, which are none.
    """
    try:
        return json.loads(data, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")
