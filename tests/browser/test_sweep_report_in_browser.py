"""A sweep's report in a real Chromium: every chart is drawn and nothing of others runs (`make browser`)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sample_sweep import sample_sweep

from diki_ray.report.sweep import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="NO CHROMIUM HERE: a sweep's report was NOT looked at in a browser"
)


def test_charts_are_drawn_and_nothing_complains(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    probe = "<script>addEventListener('load', () => document.title = String(window.hostileRan))</script>"
    page.write_text(render(sample_sweep()).replace("</body>", f"{probe}</body>"))
    quiet = (
        "--headless --no-sandbox --no-first-run --disable-background-networking --enable-logging=stderr --log-level=0"
    )
    # The parallel coordinates are drawn by WebGL, here without a graphics card.
    drawing = "--use-angle=swiftshader --enable-unsafe-swiftshader --virtual-time-budget=10000 --dump-dom"
    command = [str(CHROMIUM), *quiet.split(), *drawing.split(), f"--user-data-dir={tmp_path}/profile", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    dom = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    for name in ("parallel", "pareto", "orders", "effects"):
        chart = dom[dom.index(f'id="{name}"') :]
        assert "main-svg" in chart[:20_000], name
    assert "parcoords" in dom
    assert "<title>undefined</title>" in dom
    assert not re.findall(r"CONSOLE.*", done.stderr)
