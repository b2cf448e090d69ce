"""docs/tutorial.md: its commands, typed one after another in a fresh folder, do what the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "tutorial.md"


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_the_tutorials_commands_do_what_it_says(tmp_path: Path) -> None:
    for name in ("jobs", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    said = []
    for command in commands:
        done = subprocess.run(
            ["bash", "-e", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout)
    results = json.loads((tmp_path / "storage/runs/mine/results/results.json").read_text())
    first, last = results["accuracy"]
    assert first[0] > 2 * results["tasks"][0]["chance"]  # learnt, and hardly moved by the next
    assert abs(last[0] - first[0]) < 0.01
    assert last[1] > first[1]
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == len(list(tmp_path.glob("*/test/*/*.png")))
    right = sum(row["task"] == row["image"].partition("/")[0] for row in rows)
    assert right > 0.9 * len(rows)
    assert any(f"{len(rows)} images in" in text for text in said)
