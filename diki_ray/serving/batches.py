"""Images that wait are answered together, as many as one pass takes, in the one thread that the model has."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[Q, A]):
    question: Q
    answer: Future[A] = field(default_factory=Future)


class Batches(Generic[Q, A]):
    """Hands questions to `answer_all`, at most `max_size` at once. While one pass is computed the next one fills.

    A pass begins when as many images wait for it as are still on their way: one image alone waits for nobody, and many
    make two passes in turn, of which one is decoded while the other is computed. After `wait_s` it begins anyway.

    num_inside: returns how many images are on their way or wait.
    """

    def __init__(
        self, answer_all: Callable[[list[Q]], list[A]], max_size: int, wait_s: float, num_inside: Callable[[], int]
    ) -> None:
        self._answer_all, self._max_size, self._wait_s, self._num_inside = answer_all, max_size, wait_s, num_inside
        self._queue: queue.SimpleQueue[_Waiting[Q, A] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="diki-serve-model", daemon=True).start()

    def ask(self, question: Q) -> Future[A]:
        """Returns the answer that will be. A future that is cancelled before its pass begins is left out of it."""
        waiting: _Waiting[Q, A] = _Waiting(question)
        self._queue.put(waiting)
        return waiting.answer

    def close(self) -> None:
        """Ends the thread once what was asked before is answered."""
        self._queue.put(None)

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, ended = self._filled(first)
            asked = [w for w in batch if w.answer.set_running_or_notify_cancel()]
            try:
                answers = self._answer_all([w.question for w in asked]) if asked else []
            except Exception as error:  # whoever asked hears of it; the thread goes on
                for w in asked:
                    w.answer.set_exception(error)
            else:
                for w, answer in zip(asked, answers, strict=True):
                    w.answer.set_result(answer)
            if ended:
                return

    def _filled(self, first: _Waiting[Q, A]) -> tuple[list[_Waiting[Q, A]], bool]:
        """Returns a pass's questions, and whether the end was met among them."""
        batch, until = [first], time.monotonic() + self._wait_s
        while len(batch) < self._max_size:
            left = until - time.monotonic() if 2 * len(batch) < self._num_inside() else 0.0
            try:
                waiting = self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if waiting is None:
                return batch, True
            batch.append(waiting)
        return batch, False
