"""What a run shows while it goes on: one line an epoch, readable in a log file too, and a live bar on a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diki_ray.errors import UserError
from diki_ray.store.interface import HeldRun

POLL_S = 0.5
SAY_AFTER_S = 30.0
"""Progress that is slower than a quarter in this time is said when it comes."""

BATCHES = "batches of test images"
SCORES = "modules' scores among the class names"
TOGETHER = "sets of tasks that answer together"
OnProgress = Callable[[str, int, int], None]
"""Called with (what is counted, one of the above; how many of them are done; how many there are)."""


class Listener(Protocol):
    """Hears what workers report (`trainer._Meter`) and what the evaluator counts."""

    def on_event(self, event: dict[str, Any]) -> None: ...


class Display:
    """Shows events on a console."""

    def __init__(self, console: Console):
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar: dict[str, Any] = {}
        self._tasks: Sequence[str] = ()
        self._begun: dict[str, tuple[float, int]] = {}
        self._said = (-1, 0.0)

    def expect(self, tasks: Sequence[str]) -> None:
        """The tasks that will be trained, in order."""
        self._tasks = tasks

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_event(self, event: dict[str, Any]) -> None:
        if event["kind"] in ("step", "epoch"):
            self._training(event)
        elif event["kind"] == "evaluated":
            self._evaluation(event["what"], event["done"], event["total"])

    def _training(self, event: dict[str, Any]) -> None:
        task = event["task"]
        if task not in self._bar:
            self._bar[task] = self.bars.add_task(task, total=event["num_steps"], note="")
            self._begun[task] = (time.monotonic(), event["step"])
        note = f"loss {event['loss']:.3f}  {event['images_per_s']:.0f} images/s"
        self.bars.update(self._bar[task], completed=event["step"], note=note)
        if event["kind"] == "epoch":
            self.say(self._epoch_line(event))
            if event["epoch"] + 1 == event["num_epochs"]:
                self.bars.remove_task(self._bar.pop(task))

    def _epoch_line(self, event: dict[str, Any]) -> str:
        task, validation = event["task"], event.get("validation_accuracy")
        where = f"[{self._tasks.index(task) + 1}/{len(self._tasks)}] " if task in self._tasks else ""
        started, first_step = self._begun[task]
        done = event["step"] - first_step
        left = (event["num_steps"] - event["step"]) * (time.monotonic() - started) / done if done else 0.0
        parts = [
            f"{where}{task}",
            f"epoch {event['epoch'] + 1}/{event['num_epochs']}",
            f"loss {event['loss']:.3f}",
            f"train {100 * event['accuracy']:.1f} %",
            *([] if validation is None else [f"val {100 * validation:.1f} %"]),
            f"{event['images_per_s']:.0f} images/s",
            f"{timedelta(seconds=round(left))} left for this task",
        ]
        return "  ".join(parts)

    def _evaluation(self, what: str, done: int, total: int) -> None:
        if not total:
            return
        if what not in self._bar:
            self._bar[what] = self.bars.add_task("evaluation", total=total, note=what)
            self._said = (-1, 0.0)
        self.bars.update(self._bar[what], completed=done)
        (quarter, at), now = self._said, time.monotonic()
        if 4 * done // total > quarter or now - at >= SAY_AFTER_S:
            self.say(f"evaluation  {done}/{total} {what}")
            self._said = (4 * done // total, now)


def counted(
    results: Iterator[tuple[int, Any]], sizes: Sequence[int], what: str, on_progress: OnProgress
) -> Iterator[tuple[int, Any]]:
    """The results of pieces of work as they come, counted. sizes: what each piece counts for."""
    done = 0
    on_progress(what, done, sum(sizes))
    for number, result in results:
        done += sizes[number]
        on_progress(what, done, sum(sizes))
        yield number, result


@contextmanager
def following(store: HeldRun, listeners: Sequence[Listener]) -> Iterator[None]:
    """While in it, what the workers report to the store reaches the listeners, from a thread of this process."""
    stop = threading.Event()
    position, _ = store.progress()

    def drain() -> None:
        nonlocal position
        position, events = store.progress(position)
        for event in events:
            for listener in listeners:
                listener.on_event(event)

    def poll() -> None:
        while not stop.wait(POLL_S):
            try:
                drain()
            except UserError:
                return  # the run was lost or the store is away: the main thread meets the same error and says it

    thread = threading.Thread(target=poll, name="diki-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    drain()
