"""How a command ends at Ctrl-C or SIGTERM: it says so at once, cleans up, and is gone within seconds.

The first signal raises KeyboardInterrupt in the main thread, so every block on the way is left as at an error: the run
is given back and a cluster that was started here ends. Signals after it change nothing.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec

P = ParamSpec("P")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CLEANING_UP_S = 12.0
"""After so long the process ends as it is. Nothing is lost by that, as with SIGKILL; Ray's processes see it and end."""


_first: list[int] = []
"""The first signal that came in this command; Ray's calls turn what a handler raises into a KeyboardInterrupt."""


def stoppable(main: Callable[P, int]) -> Callable[P, int]:
    """Returns `main`, which at SIGINT or SIGTERM says "Stopping…" and returns 130 or 143, as a shell counts them."""

    @functools.wraps(main)
    def run(*arguments: P.args, **named: P.kwargs) -> int:
        if threading.current_thread() is not threading.main_thread():
            return main(*arguments, **named)  # signals are the main thread's
        try:
            with _heeding_signals():
                return main(*arguments, **named)
        except KeyboardInterrupt:
            if not _first:
                raise
            return 128 + _first[0]

    return run


def heeded() -> bool:
    """Whether this process is in a stoppable command."""
    return signal.getsignal(signal.SIGTERM) is _on_signal


def heed() -> None:
    """Sets the handlers of a stoppable command, also those that a library put in C++ under Python's."""
    for number in SIGNALS:
        signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if not _first:
        _first.append(number)
        raise KeyboardInterrupt


@contextmanager
def _heeding_signals() -> Iterator[None]:
    _first.clear()
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # as signal.set_wakeup_fd asks for
    ended = threading.Event()
    threading.Thread(target=_watch, args=(reader, ended), name="diki-signals", daemon=True).start()
    former_writer = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    former = {number: signal.getsignal(number) for number in SIGNALS}
    heed()
    try:
        yield
    finally:
        ended.set()
        for number, handler in former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(former_writer)
        writer.close()  # the thread reads the end and ends


def _watch(reader: socket.socket, ended: threading.Event) -> None:
    """Hears of a signal also while the main thread is in C, where no handler of Python's can run."""
    with reader:
        while said := reader.recv(1):
            if said[0] in SIGNALS:
                print("Stopping…", file=sys.stderr, flush=True)
                if not ended.wait(CLEANING_UP_S):
                    os._exit(128 + said[0])
                return
