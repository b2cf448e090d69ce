"""The oracle of the tests of recovery, and an end for every job that a failed test left running."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from job_runs import STARTED, Run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Run:
    """A run that nothing disturbed."""
    run = Run(tmp_path_factory.mktemp("undisturbed"), prepared)
    job = run.begin()
    done = job.wait()
    assert done.returncode == 0, done.stderr
    job.assert_nothing_is_left()
    return run


@pytest.fixture(autouse=True)
def no_job_is_left() -> Iterator[None]:
    yield
    while STARTED:
        STARTED.pop().kill_all()
