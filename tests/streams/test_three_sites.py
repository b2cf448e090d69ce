"""docs/sites.md: its commands, typed at three sites that share nothing but the agreed file, do what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from noise_images import draw

from diki_ray.learning.module import TaskModule
from diki_ray.store.run_store import RunStore

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "sites.md").read_text()
SITES = {"north": {"crack": 12, "dent": 14}, "south": {"dent": 11, "scratch": 13}, "east": {"crack": 15, "scratch": 3}}


def begun(command: str, folder: Path) -> subprocess.Popen[str]:
    """The command as it is typed in a folder, which has the agreed file and this site's images and storage."""
    folder.mkdir(exist_ok=True)
    (agreed,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
    (folder / "agreed.yaml").write_text(agreed)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        ["bash", "-e", "-c", command], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said
    return said


def merged(folder: Path) -> TaskModule:
    store = RunStore.open(str(folder / "storage"), "defects")
    [entry] = store.modules()
    return TaskModule.from_bytes(store.read_module(entry.digest))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_three_processes_with_folders_of_their_own_make_the_module_of_one(tmp_path: Path) -> None:
    at_a_site, at_the_centre, export, measure = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S)
    for site in SITES:
        draw(tmp_path / site / "images", SITES[site], site)
    said = [ended(process) for process in [begun(at_a_site, tmp_path / site) for site in SITES]]
    assert "Left out, as they have fewer than 10: scratch" in said[2]
    assert "crack 12, dent 14" in said[0]
    centre = tmp_path / "centre"
    centre.mkdir()
    for site in SITES:
        shutil.copy(tmp_path / site / "my.part", centre / f"{site}.part")
    shutil.copy(tmp_path / "north/images/test/dent/north0.png", centre / "photo.jpg")
    assert "task 'defects' of 3 parts, 65 images" in ended(begun(at_the_centre, centre))

    one = tmp_path / "one"
    for site in SITES:
        draw(one / "images", SITES[site], site)
    for path in (one / "images/train/scratch").glob("east*.png"):  # too few, so that they stayed at their site
        path.unlink()
    ended(begun(f"{at_a_site}diki-ray site merge my.part --config agreed.yaml --json", one))
    expected, module = merged(one), merged(centre)
    assert module.class_statistics.counts.tolist() == [27, 25, 13]
    for name, array in expected.class_statistics.tensors().items():
        np.testing.assert_array_equal(module.class_statistics.tensors()[name], array)
    assert module.provenance["backbone"] == expected.provenance["backbone"]

    again = "diki-ray site merge east.part south.part north.part --config agreed.yaml --json"
    assert json.loads(ended(begun(again, centre)))["digest"] == module.digest
    assert not (centre / "images").exists()

    ended(begun(export, centre))
    fourth = tmp_path / "fourth"
    draw(fourth / "images", dict.fromkeys(("crack", "dent", "scratch"), 15), "fourth")
    shutil.copy(centre / "run.tar", fourth)
    assert "after 1 tasks, test split" in ended(begun(measure, fourth))
    assert merged(fourth).key == module.key
