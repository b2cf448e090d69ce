"""The site: the reference is what the types give, and every page can be reached."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import yaml

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_the_configuration_reference_is_what_the_types_give() -> None:
    generator = runpy.run_path(str(DOCS / "generate_reference.py"))
    assert (DOCS / "configuration.md").read_text() == generator["page"](), f"type: {generator['COMMAND']}"


def test_the_reference_has_each_fields_type_bounds_default_and_meaning() -> None:
    page = (DOCS / "configuration.md").read_text()
    assert "| `num_streams` | whole number, ≥ 1 | `24` | modules | Virtual streams; any number of workers up" in page
    assert "| `take_over` | true, false | `false` | nothing | True: take the run from another driver" in page
    for title in ("### `train`", "### `evaluate`", "## A sweep", "## A server"):
        assert f"\n{title}\n" in page


def test_every_page_is_in_the_navigation() -> None:
    pages = re.findall(r"[\w-]+\.md", str(yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text())["nav"]))
    assert sorted(pages) == sorted(path.name for path in DOCS.glob("*.md")), "pages and `nav` in mkdocs.yml differ"
