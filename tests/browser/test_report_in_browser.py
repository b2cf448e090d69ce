"""report.html in a real Chromium, on a wide and a narrow window, light and dark: `make browser`.

What can be measured is: nothing sticks out of the page, every picture loads, every text has the contrast that WCAG AA
asks for, nothing that came with a class name runs, and the page as it is gives the browser nothing to complain about.
REPORT_SCREENSHOTS=folder keeps pictures of it for people to look at.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sample_results import sample_results, with_test_shards

from diki_ray.report.run import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDE, NARROW = 1400, 420
NAMES = ["digits", "neon", "mist", "fog", "night", "StanfordCars", "OxfordPets", "a_name_of_64_letters_" + "x" * 43]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="NO CHROMIUM HERE: report.html was NOT looked at in a browser (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    one = sample_results(NAMES)
    one["tasks"][0] = with_test_shards(one["tasks"][0], folder / "digits")
    for task in one["tasks"]:
        task["class_names"].append("<img src=x onerror='window.hostileRan=true'>")
    several = [one, sample_results(NAMES[:3], "another", seed=1), sample_results(NAMES[:1], "a-third", seed=2)]
    written = {}
    for name, runs in {"one": [one], "several": several}.items():
        written[name] = folder / f"{name}.html"
        written[name].write_text(render(runs))
    return written


def chromium(folder: Path, page: Path, width: int, dark: bool, *arguments: str) -> subprocess.CompletedProcess[str]:
    quiet = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --log-level=0"
    )
    command = [
        str(CHROMIUM),
        *quiet.split(),
        f"--user-data-dir={folder}/profile",
        f"--window-size={width},1200",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=3000",
        *arguments,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def measure(folder: Path, page: Path, width: int, dark: bool) -> dict[str, Any]:
    """Of a copy of the page in which scripts may run: measure.js, and whatever else would.

    In a frame of that width, because a window of Chromium's is never narrower than 500 px.
    """
    script = (Path(__file__).parent / "measure.js").read_text()
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text(), count=1)
    # Closed parts are opened, so that all of the page is measured.
    text = text.replace("<details>", "<details open>").replace("</body>", f"<script>{script}</script></body>")
    frame = folder / "frame.html"
    frame.write_text(
        '<!doctype html><html style="color-scheme:light dark"><body>'
        f'<iframe style="border:0;width:{width}px;height:1200px" srcdoc="{html.escape(text)}"></iframe></body></html>'
    )
    dom = chromium(folder, frame, width, dark, "--dump-dom").stdout
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    assert found, "measure.js did not run"
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", ["one", "several"])
def test_the_page_can_be_read(pages: dict[str, Path], tmp_path: Path, name: str, width: int, dark: bool) -> None:
    found = measure(tmp_path, pages[name], width, dark)
    assert (found["width"], found["dark"]) == (width, dark)
    assert found["pageWidth"] <= width
    assert found["sticksOut"] == []
    assert found["broken"] == []
    assert found["numImages"] == 8
    assert found["numCharts"] == 3 * (len(NAMES) if name == "one" else len(NAMES) + 4)
    assert found["faint"] == []
    assert found["small"] == 0
    assert not found["ran"]


def test_the_browser_has_nothing_to_complain_about(pages: dict[str, Path], tmp_path: Path) -> None:
    for page in pages.values():
        log = chromium(tmp_path, page, WIDE, False, "--dump-dom").stderr
        assert "CONSOLE" not in log  # where a refused style, script or picture would be told


def test_screenshots_are_taken(pages: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(os.environ.get("REPORT_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():
        for width, dark in ((WIDE, False), (WIDE, True), (NARROW, False)):
            file = folder / f"{name}-{width}-{'dark' if dark else 'light'}.png"
            chromium(tmp_path, page, width, dark, f"--screenshot={file}", f"--window-size={width},6000")
            assert file.stat().st_size > 50_000
