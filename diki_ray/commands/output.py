"""Everything that commands print goes through here: in a terminal as wide as it is, in a pipe 160 columns wide."""

from __future__ import annotations

import sys

from rich.console import Console

WIDTH_IN_A_PIPE = 160


def prepare_output() -> None:
    """Make standard output and error write what their encoding lacks as `\\u2026` and the like, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def console(soft_wrap: bool = False) -> Console:
    """The console of tables and bars. It has no colours where NO_COLOR is set or nobody looks."""
    return Console(width=None if sys.stdout.isatty() else WIDTH_IN_A_PIPE, soft_wrap=soft_wrap)


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
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
