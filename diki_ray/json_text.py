"""JSON of elsewhere: what `json` takes beyond JSON (NaN) and what makes it fail in other ways is a ValueError."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def parsed(data: bytes | str) -> Any:
    """The value that a JSON text stands for.

    Raises:
        ValueError: it is no JSON, nested too deeply, or has NaN, Infinity or half a character, which are none.
    """
    try:
        value = json.loads(data, parse_constant=_refuse)
        # Half of a pair, as in "\\udc00", is no text: it could be read, and written nowhere.
        if (b"\\u" if isinstance(data, bytes) else "\\u") in data:  # type: ignore[operator]
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")
