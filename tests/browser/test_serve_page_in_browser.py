"""The server's page in a real Chromium: an image is dropped on it, and what it shows is what the server answered.

SERVE_SCREENSHOTS=folder keeps pictures of it; SERVE_STORAGE and SERVE_RUN show a run of yours instead of a tiny one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import uvicorn
from devtools import Page, chromium
from stored_run import TOKEN, StoredRun, picture_file

from diki_ray.serving.app import Service, build_app
from diki_ray.serving.loaded_model import LoadedModel
from diki_ray.serving.settings import Settings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = (Path(__file__).parent / "measure.js").read_text()
HOSTILE = "<img src=x onerror='window.hostileRan=true'>"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="NO CHROMIUM HERE: the server's page was NOT looked at in a browser"
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    run = StoredRun(tmp_path_factory.mktemp("run"), "warm", "cold", "lush")
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    storage, name = os.environ.get("SERVE_STORAGE", run.storage), os.environ.get("SERVE_RUN", "colours")
    backbone = run.config.backbone.name if storage == run.storage else None
    settings = Settings(storage=storage, run=name, backbone=backbone, token_sha256=digest)
    service = Service(settings, LoadedModel(settings))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(build_app(service), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()
    service.close()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("SERVE_IMAGE")
    file = tmp_path_factory.mktemp("image") / "picture.png"
    file.write_bytes(Path(given).read_bytes() if given else picture_file("warm", 500))
    return file


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(str(CHROMIUM), tmp_path_factory.mktemp("chromium")) as page:
        yield page


def text(page: Page, selector: str) -> str:
    return page.see(f"document.querySelector('{selector}').textContent")


def test_a_dropped_image_is_answered_and_everything_about_it_shown(page: Page, url: str, image: Path) -> None:
    page.open(url, 1200, dark=False)
    page.wait_for("!document.querySelector('#token-card').hidden")
    assert "asks for a token" in text(page, "#status")
    page.type("#token", "wrong-token-0123456789")
    page.press("Enter", 13)
    page.wait_for("document.querySelector('#status').textContent.includes('does not know')")
    page.see("document.querySelector('#token').value = ''")
    page.type("#token", TOKEN)
    page.press("Enter", 13)
    page.wait_for("document.querySelector('#token-card').hidden")
    page.drop(image, "#drop")
    page.wait_for("!document.querySelector('#answer').hidden")

    files = [("image", ("picture.png", image.read_bytes()))]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    told = requests.post(f"{url}/predict", files=files, headers=headers, timeout=60).json()
    (answer,) = told["answers"]
    assert text(page, "#class") == answer["class_name"]
    assert text(page, "#plain-class") == answer["plain_clip"][0]["class_name"]
    assert text(page, "#task") == answer["task"]
    assert text(page, "#weight").startswith(f"{answer['weight']:.3f}")
    assert f"version {told['version']} " in text(page, "#version")
    rows = page.see("[...document.querySelectorAll('#densities th')].map((e) => e.textContent)")
    assert rows == sorted(answer["log_densities"], key=lambda task: -answer["log_densities"][task])
    chosen = page.see("document.querySelector('#densities tr.chosen th').textContent")
    assert chosen == answer["task"]
    assert page.see("document.querySelector('#top').rows.length") == len(answer["top"])
    assert page.see("document.querySelector('#preview').naturalWidth") > 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 420], ids=["wide", "narrow"])
def test_the_page_can_be_read_and_nothing_of_an_answer_runs(
    page: Page, url: str, image: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    page.open(url, width, dark)  # the token is still known to the tab
    page.drop(image, "#drop")
    page.wait_for("!document.querySelector('#answer').hidden")
    folder = Path(os.environ.get("SERVE_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(folder / f"serve_page-{width}-{'dark' if dark else 'light'}.png")
    page.see("document.querySelector('details').open = true")
    page.type("#classes", f"{HOSTILE}\na dog\n{'x' * 100}")
    page.see("document.querySelector('#again').click()")
    page.wait_for("[...document.querySelectorAll('#top th')].some((e) => e.textContent === 'a dog')")
    shown = page.see("[...document.querySelectorAll('#top th')].map((e) => e.textContent)")
    assert set(shown) == {HOSTILE, "a dog", "x" * 100}
    page.see(f"(() => {{ {MEASURE} }})()")
    found = page.see("JSON.parse(document.querySelector('#measured').textContent)")
    assert (found["width"], found["dark"]) == (width, dark)
    assert found["pageWidth"] <= width
    assert found["sticksOut"] == []
    assert found["broken"] == []
    assert found["faint"] == []
    assert not found["ran"]


def test_every_field_has_a_name_and_a_key_reaches_it(page: Page, url: str) -> None:
    page.open(url, 1200, dark=False)
    unnamed = "[...document.querySelectorAll('input, textarea')].filter((e) => !e.labels.length).map((e) => e.id)"
    assert page.see(unnamed) == []
    reached = set()
    for _ in range(4):
        page.press("Tab", 9)
        reached.add(page.see("document.activeElement.id || document.activeElement.tagName"))
    assert {"file", "SUMMARY"} <= reached
    assert page.see("document.querySelector('#status').getAttribute('role')") == "status"


def test_the_browser_has_nothing_to_complain_about_and_asks_nobody_else(page: Page, url: str) -> None:
    refused = [told for told in page.complaints() if "401" not in told]
    assert refused == []
    assert all(address.startswith((url, "blob:", "data:", "about:")) for address in page.requested())


def test_what_is_put_into_the_page_all_the_same_is_stopped_by_its_policy(page: Page, url: str) -> None:
    page.open(url, 1200, dark=False)
    page.see(
        f"""(() => {{
        window.stopped = [];
        document.addEventListener('securitypolicyviolation', (e) => window.stopped.push(e.effectiveDirective));
        const script = document.createElement('script');
        script.textContent = 'window.hostileRan = true';
        const place = document.createElement('div');
        place.innerHTML = `{HOSTILE}<iframe src="data:text/html,x"></iframe><img src="http://127.0.0.1:9/x">`;
        document.body.append(place, script);
        fetch('http://127.0.0.1:9/').catch(() => 0);
        }})()"""
    )
    page.wait_for("window.stopped.length >= 5", 20)
    assert page.see("window.hostileRan === undefined")
    stopped = set(page.see("window.stopped"))
    assert {"script-src-elem", "script-src-attr", "img-src", "connect-src", "frame-src"} <= stopped
