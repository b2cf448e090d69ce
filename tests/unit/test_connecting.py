"""How every job finds its Ray cluster: whom it joins, what it starts, and what it leaves alone."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray

from diki_ray.errors import ConfigError
from diki_ray.runs.cluster import LOCAL, connected


class FakeRay:
    """Ray's own connection, which only remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.is_up = False

    def init(self, **options: Any) -> None:
        self.asked.append(options)
        self.is_up = True

    def shutdown(self) -> None:
        self.is_up = False


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(ray, "init", fake.init)
    monkeypatch.setattr(ray, "shutdown", fake.shutdown)
    monkeypatch.setattr(ray, "is_initialized", lambda: fake.is_up)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return fake


def asked_for(fake: FakeRay) -> tuple[Any, ...]:
    (options,) = fake.asked
    return options["address"], options["num_cpus"], options["include_dashboard"]


@pytest.mark.parametrize(
    ("given", "said", "expected"), [(LOCAL, None, "0"), (LOCAL, "1", "1"), ("head:6379", None, None)]
)
def test_only_nodes_of_a_cluster_that_is_joined_are_watched(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch, given: str, said: str | None, expected: str | None
) -> None:
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    monkeypatch.delenv(name, raising=False)
    if said:
        monkeypatch.setenv(name, said)
    with connected(given):
        assert os.environ.get(name) == expected
    assert os.environ.get(name) == said


def test_the_jobs_environment_is_passed_on(fake: FakeRay) -> None:
    with connected(LOCAL, runtime_env={"env_vars": {"A": "1"}}):
        assert fake.asked[0]["runtime_env"] == {"env_vars": {"A": "1"}}


@pytest.mark.parametrize(
    ("given", "in_environment", "expected"),
    [
        (None, None, (LOCAL, 2, False)),
        (None, "head:6379", ("head:6379", None, None)),
        ("other:6379", "head:6379", ("other:6379", None, None)),
        (LOCAL, "head:6379", (LOCAL, 2, False)),
    ],
)
def test_an_address_is_joined_and_without_one_a_cluster_is_started(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch, given: str | None, in_environment: str | None, expected: Any
) -> None:
    if in_environment:
        monkeypatch.setenv("RAY_ADDRESS", in_environment)
    with connected(given, num_cpus=2) as joined:
        assert joined == (expected[0] != LOCAL)
        assert fake.is_up
    assert asked_for(fake) == expected
    assert not fake.is_up


def test_a_connection_that_is_there_is_used_and_kept(fake: FakeRay) -> None:
    fake.is_up = True
    with connected("other:6379") as joined:
        assert not joined
    assert fake.asked == []
    assert fake.is_up


def test_a_connection_ends_with_an_error_of_its_block(fake: FakeRay) -> None:
    with pytest.raises(KeyError), connected():
        raise KeyError
    assert not fake.is_up


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("other:6379", r"^address='other:6379': .*leave address out"),
        (None, r"^RAY_ADDRESS='head:6379': no Ray cluster"),
    ],
)
def test_an_address_that_cannot_be_joined_is_named_as_the_user_gave_it(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch, given: str | None, says: str
) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError("nobody answers\n  and a trace")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(ConfigError, match=says), connected(given, setting="address"):
        pass
