"""Command lines as they were written before every command had the same options; they work, and a word says the new one.

evaluate STORAGE RUN            export STORAGE RUN FOLDER         import FILE STORAGE RUN
store COMMAND STORAGE [RUN …]   --compare A B, --class-names A B: several values after one option
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

_WITH_VALUE = {
    *("--storage", "--run", "--config", "--backbone", "--pretrained", "--directory", "--routing", "--label-space"),
    *("--order", "--split", "--compare", "--protocol", "--sources", "--classes"),
}
_SEVERAL = {"evaluate": "--compare", "prepare": "--class-names"}
_FLAG_IN = {"evaluate": ("--classes",)}
_NEW_POSITIONALS = {
    "verify": 0,
    "list": 0,
    "purge": 0,
    "compact": 0,
    "fill": 0,
    "export": 1,
    "import": 1,
    "remove": 1,
    "rollback": 1,
}


def rewritten(typed: Sequence[str]) -> list[str]:
    """The same command line in today's spelling."""
    command, rest = (typed[0], list(typed[1:])) if typed else ("", [])
    if command in _SEVERAL:
        rest = _one_value_each(rest, _SEVERAL[command])
    if command == "evaluate":
        rest = _named(rest, command, 0, place=0)
    elif command == "export":
        rest = _named(rest, command, 1, place=0)
    elif command == "import":
        rest = _named(rest, command, 1, place=1)
    elif command == "store" and rest and rest[0] in _NEW_POSITIONALS:
        rest = [rest[0], *_named(rest[1:], f"store {rest[0]}", _NEW_POSITIONALS[rest[0]], place=0)]
    return [command, *rest] if typed else []


def _named(rest: list[str], command: str, new: int, place: int) -> list[str]:
    """With the STORAGE and the RUN that stand at `place` among more than `new` positional arguments as options."""
    positions = _positions(rest, command)
    extra = len(positions) - new
    if extra not in (1, 2) or (extra == 1 and command != "store list"):
        return rest
    moved = positions[place : place + extra]
    options = [f"--{name}={rest[at]}" for name, at in zip(("storage", "run"), moved, strict=False)]
    print(f"note: STORAGE and RUN are now written as options: {' '.join(options)}", file=sys.stderr)
    return [*options, *(word for at, word in enumerate(rest) if at not in moved)]


def _positions(rest: list[str], command: str) -> list[int]:
    """Where the positional arguments are, without section.field=value."""
    found, skip = [], False
    with_value = _WITH_VALUE - set(_FLAG_IN.get(command, ()))
    for at, word in enumerate(rest):
        if skip or word.startswith("-"):
            skip = not skip and word in with_value
        elif command != "import" or "=" not in word:
            found.append(at)
    return found


def _one_value_each(rest: list[str], option: str) -> list[str]:
    """`--option A B` as `--option A --option B`."""
    out: list[str] = []
    inside = False
    for word in rest:
        if word.startswith("-"):
            inside = word == option
            if not inside:
                out.append(word)
        else:
            out += [option, word] if inside else [word]
    return out
