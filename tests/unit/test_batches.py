"""What waits for the model is answered together, by one thread, and nobody's mistake is another's."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from diki_ray.serving.batches import Batches


def test_while_one_pass_is_computed_the_next_one_fills() -> None:
    begun, go_on, passes = threading.Event(), threading.Event(), list[list[Any]]()

    def answer_all(questions: list[Any]) -> list[Any]:
        passes.append(questions)
        begun.set()
        assert go_on.wait(10)
        return [f"answer {question}" for question in questions]

    batches = Batches(answer_all, max_size=4, wait_s=0.0, num_inside=lambda: 8)
    first = batches.ask(0)  # type: ignore[arg-type]
    assert begun.wait(10)
    later = [batches.ask(n) for n in range(1, 8)]  # type: ignore[arg-type]
    assert later[0].cancel()  # whoever asked has gone
    go_on.set()
    assert first.result(10) == "answer 0"
    assert [future.result(10) for future in later[1:]] == [f"answer {n}" for n in range(2, 8)]
    assert passes == [[0], [2, 3, 4], [5, 6, 7]]
    batches.close()


@pytest.mark.parametrize(("inside", "size"), [(1, 1), (6, 3), (7, 4)])
def test_a_pass_waits_until_as_many_wait_for_it_as_are_on_their_way(inside: int, size: int) -> None:
    passes: list[int] = []

    def answer_all(questions: list[Any]) -> list[Any]:
        passes.append(len(questions))
        return questions

    batches = Batches(answer_all, max_size=32, wait_s=30.0, num_inside=lambda: inside)
    for future in [batches.ask(n) for n in range(size)]:  # type: ignore[arg-type]
        future.result(10)
    assert passes == [size]
    batches.close()


def test_a_pass_waits_no_longer_than_it_may() -> None:
    batches = Batches(lambda questions: questions, max_size=32, wait_s=0.2, num_inside=lambda: 9)  # type: ignore
    started = time.monotonic()
    assert batches.ask(0).result(10) == 0  # type: ignore[arg-type, comparison-overlap]
    assert 0.2 <= time.monotonic() - started < 5
    batches.close()


def test_an_error_reaches_those_of_its_pass_and_the_next_pass_is_answered() -> None:
    def answer_all(questions: list[Any]) -> list[Any]:
        if "bad" in questions:
            raise ValueError("bad")
        return questions

    batches = Batches(answer_all, max_size=1, wait_s=0.0, num_inside=lambda: 2)
    bad, good = batches.ask("bad"), batches.ask("good")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bad"):
        bad.result(10)
    assert good.result(10) == "good"
    batches.close()
