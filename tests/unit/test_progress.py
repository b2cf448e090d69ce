"""What a run says while it goes on: enough for a log file, and no silence of minutes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from diki_ray.runs import progress
from diki_ray.runs.progress import BATCHES, SAY_AFTER_S, SCORES, Display


def said(events: list[tuple[str, int, int]], seconds_each: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that these events of an evaluation leave in a log, one every `seconds_each`."""
    now = iter(1000 + seconds_each * n for n in range(len(events)))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    out = io.StringIO()
    display = Display(Console(file=out, width=200))
    for what, done, total in events:
        display.on_event({"kind": "evaluated", "what": what, "done": done, "total": total})
    return out.getvalue().splitlines()


def test_an_evaluation_says_each_quarter_of_what_it_does_and_then_what_comes_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = [(BATCHES, n, 8) for n in range(9)] + [(SCORES, n, 4) for n in range(5)]
    assert said(events, 1.0, monkeypatch) == [
        *(f"evaluation  {n}/8 {BATCHES}" for n in (0, 2, 4, 6, 8)),
        *(f"evaluation  {n}/4 {SCORES}" for n in range(5)),
    ]


def test_what_is_slow_is_said_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(said([(SCORES, n, 100) for n in range(11)], SAY_AFTER_S, monkeypatch)) == 11


def test_nothing_to_do_is_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said([(SCORES, 0, 0)], 1.0, monkeypatch) == []
