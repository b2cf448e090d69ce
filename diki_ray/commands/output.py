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


def print_error(error: Exception) -> None:
    """What went wrong, as one sentence on standard error."""
    print(f"error: {plain(str(error))}", file=sys.stderr)


def plain(text: str) -> str:
    """The text with what would move a terminal's cursor or colour it written out: names are other people's."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
