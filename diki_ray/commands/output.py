"""Everything that commands print goes through here: in a terminal as wide as it is, in a pipe 160 columns wide.

A job's results do not hang on who reads its output: what is printed after the reader has gone is dropped.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

WIDTH_IN_A_PIPE = 160
_lost: list[OSError] = []
"""Why output of this process was dropped, other than that its reader had gone."""


class _UntilNobodyReads(io.FileIO):
    """A descriptor that goes on as the null device once it cannot be written to: a reader like `head` has gone, the
    terminal was closed, its disk is full."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BlockingIOError:
            raise  # it only waits for its reader
        except OSError as error:
            if error.errno != errno.EPIPE:
                _lost.append(error)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # for what this process starts as well
            os.close(null)
            return len(memoryview(data).cast("B"))


def prepare_output() -> None:
    """Make standard output and error take anything: what their encoding lacks is written as `\\u2026` and the like, and
    a reader that goes, or that never was, ends no job. Who follows a log file sees each line when it is printed."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:  # closed by whoever started this: files that are opened would take its number
            setattr(sys, name, _text(_descriptor(number), "utf-8"))
        elif (stream := getattr(sys, name)) is getattr(sys, f"__{name}__"):  # else a test or notebook has its own
            stream.flush()
            setattr(sys, name, _text(stream.fileno(), stream.encoding, stream.write_through))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _descriptor(number: int) -> int:
    """This descriptor, on the null device where it is closed."""
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != number:
            os.dup2(null, number)
            os.close(null)
    return number


def _text(descriptor: int, encoding: str, write_through: bool = False) -> TextIO:
    raw = _UntilNobodyReads(descriptor, "w", closefd=False)
    # A character of several bytes may be cut where the encoding of the terminal is none of Unicode's.
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", None, True, write_through)


def finish_output() -> OSError | None:
    """Write out what is printed so far; why some of it was lost, unless it is that its reader had gone."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return _lost[0] if _lost else None


class _PlainConsole(Console):
    """Its own colours apart, a terminal gets text that is printable: names in it are other people's."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


def console(soft_wrap: bool = False) -> Console:
    """The console of tables and bars. It has no colours where NO_COLOR is set or nobody looks."""
    return _PlainConsole(width=None if sys.stdout.isatty() else WIDTH_IN_A_PIPE, soft_wrap=soft_wrap)


def print_text(text: str) -> None:
    """The text on standard output, printable."""
    print(plain(text))


def print_json(value: Any) -> None:
    """The value as JSON on standard output; characters that would move a cursor are escaped, as JSON has it.

    Raises:
        ValueError: NaN or infinity is in it, which are none of JSON's.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    print(re.sub(r"[^ -~\n]", lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text))


def about(seconds: float) -> str:
    """A time that is not known better: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(num_bytes: float) -> str:
    """A number of bytes, as in `3.2 MB`."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} bytes"
    power = next((n for n in (1, 2, 3) if num_bytes < 1000 ** (n + 1)), 4)
    number = num_bytes / 1000**power
    return f"{number:,.0f} {'KMGT'[power - 1]}B" if number >= 100 else f"{number:.1f} {'KMGT'[power - 1]}B"


def print_error(error: Exception) -> None:
    """What went wrong, as one sentence on standard error."""
    print(f"error: {plain(str(error))}", file=sys.stderr)


def plain(text: str) -> str:
    """The text with what would move a terminal's cursor or colour it written out: names are other people's."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
