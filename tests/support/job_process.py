"""Jobs as a user starts them: in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_job(
    name: str, *arguments: object, code: int = 0, timeout_s: float = 280, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """jobs/NAME.py to its end, which has to have this exit code; None takes a variable out of the environment."""
    changed = os.environ | environment
    done = subprocess.run(
        [sys.executable, f"jobs/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        env={variable: value for variable, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done
