"""Python files that a model brings along (`trust_remote_code`) never run: weights and JSON are data, and stay data.

A folder or a hub page may name Python code for its text tower or tokenizer. Transformers runs it when the folder's own
JSON says `trust_remote_code: true`, or asks at the terminal whether it should.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from diki_ray.errors import ConfigError
from diki_ray.json_text import parsed
from diki_ray.regular_files import read_regular


def refuse_trusting(folder: Path) -> None:
    """Raises ConfigError where open_clip's JSON in a folder says anywhere that the folder's code is to be trusted."""
    path = folder / "open_clip_config.json"
    try:
        trusting = _trusting(parsed(read_regular(path)))
    except (OSError, ValueError):  # open_clip meets the same, and its error is told
        return
    if trusting:
        raise ConfigError(
            f"{path} says trust_remote_code, and Python files that a model brings along are never run: take that out, "
            "or name a Python file of your own with create(directory) as the backbone."
        )


def _trusting(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.get("trust_remote_code")) or any(map(_trusting, value.values()))
    return isinstance(value, list) and any(map(_trusting, value))


@contextmanager
def no_remote_code() -> Iterator[None]:
    """While in it transformers runs no Python file of a model's, whatever it was told, and asks nobody whether to.

    Raises:
        ConfigError: from where such a file would have been run.
    """
    try:
        from transformers import dynamic_module_utils as code
    except ImportError:  # without the extra `hf` there is nothing that could run any
        yield
        return
    # All of transformers' ways to such a file lead through `get_class_in_module`; 0 s is its way to ask nobody. A
    # version without these names fails here instead of going unguarded.
    kept = code.TIME_OUT_REMOTE_CODE, code._raise_timeout_error, code.get_class_in_module
    code.TIME_OUT_REMOTE_CODE, code._raise_timeout_error, code.get_class_in_module = 0, _refuse, _refuse
    try:
        yield
    finally:
        code.TIME_OUT_REMOTE_CODE, code._raise_timeout_error, code.get_class_in_module = kept


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ConfigError(
        "the model's files name Python code of their own (auto_map), which is never run: take a model or tokenizer of "
        "a class that transformers has, or name a Python file of your own with create(directory) as the backbone."
    )
