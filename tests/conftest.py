"""What every test needs: the shared code of tests/support, quiet and explicit Ray settings, and the common fixtures."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # workers that yield to every other test keep theirs waiting
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent / "support"))
FOLDERS = ("unit", "chaos", "ray", "browser", "streams")
"""Units before anything connects this process to a cluster; then long files before short ones, so that processes that
share the files out end together."""


class Ended(NamedTuple):
    """What a job left."""

    code: int
    stdout: str
    stderr: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FOLDERS.index(item.path.parent.name) if item.path.parent.name in FOLDERS else 0)
    for item in items:
        if item.path.parent.name in ("browser", "chaos"):
            item.add_marker(item.path.parent.name)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A test finds one thread, as a worker has, whatever the tests before it set: features depend on the number."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for prepared data sets that all tests share: each of them is drawn once."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """jobs/NAME.py in this process, on the cluster that is there: exit code, standard output and standard error."""

    def call(name: str, *arguments: object) -> Ended:
        main = runpy.run_path(str(ROOT / "jobs" / f"{name}.py"))["main"]
        monkeypatch.setenv("DIKI_LIGHT_IMPORT", "0")  # a test of other backbones may follow in this process
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as exit:  # argparse
            code = exit.code
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return Ended(code, said.out, said.err)

    return call
