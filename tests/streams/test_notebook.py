"""docs/notebook.ipynb: its cells, run one after another in an empty folder, do what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKS = """
assert model.tasks == ("mist",)
assert sum(answer == label for answer, label in zip(answers, labels)) >= 4
assert model.results_["accuracy"][1][0] > 3 * model.results_["zero_shot"][0]
"""


@pytest.mark.long
def test_the_notebooks_cells_do_what_it_says(tmp_path: Path) -> None:
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    program = "\n".join([*sources, CHECKS])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert "notebook: accuracy on each test set" in done.stdout
