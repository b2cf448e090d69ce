"""The site: the reference is what the types give, and every page can be reached."""

from __future__ import annotations

import ast
import pkgutil
import re
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_the_references_are_what_the_types_and_the_commands_give() -> None:
    generator = runpy.run_path(str(DOCS / "generate_reference.py"))
    assert generator["PAGES"].keys() == {"configuration.md", "commands.md"}
    for name, page in generator["PAGES"].items():
        assert (DOCS / name).read_text() == page(), f"type: {generator['COMMAND']}"


def test_every_command_is_described() -> None:
    page = (DOCS / "commands.md").read_text()
    for name in ("continual", "init", "doctor", "serve-front", "store rollback", "import"):
        assert f"\n## diki-ray {name}\n" in page
    assert "| `--plan` |" in page


def test_the_reference_has_each_fields_type_bounds_default_and_meaning() -> None:
    page = (DOCS / "configuration.md").read_text()
    assert "| `num_streams` | whole number, ≥ 1 | `24` | modules | Virtual streams; any number of workers up" in page
    assert "| `take_over` | true, false | `false` | nothing | True: take the run from another driver" in page
    for title in ("### `train`", "### `evaluate`", "## A sweep", "## A server"):
        assert f"\n{title}\n" in page


def test_every_page_is_in_the_navigation() -> None:
    pages = re.findall(r"[\w-]+\.md", str(yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text())["nav"]))
    assert sorted(pages) == sorted(path.name for path in DOCS.rglob("*.md")), "pages and `nav` in mkdocs.yml differ"


def test_everything_in_the_python_reference_exists_and_is_described() -> None:
    names = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.M)
    assert len(names) == len(set(names)) > 10
    for name in names:
        assert (pkgutil.resolve_name(name).__doc__ or "").strip(), name


def named_tests() -> list[tuple[str, str | None, bool]]:
    """(file, function, whether the page calls it long) of every test that docs/reliability.md names."""
    named = []
    for line in (DOCS / "reliability.md").read_text().splitlines():
        usual, _, long = line.partition("*long*")
        file = ""
        for part, is_long in ((usual, False), (long, True)):
            for path, names in re.findall(r"`((?:unit|streams|ray|chaos|gpu)/\w+\.py)?((?:::\w+)*)`", part):
                file = path or file
                if path or names:
                    named.append((file, names.rpartition("::")[2] or None, is_long))
    return named


def marked_long(path: Path) -> set[str | None]:
    """The tests of a file that are marked long; None among them: the whole file is, or some variants of its tests."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    marks = [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.long"]
    found: set[str | None] = {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and "pytest.mark.long" in map(ast.unparse, node.decorator_list)
    }
    return found | {None} if len(marks) > len(found) else found


def test_the_page_names_all_that_only_make_chaos_runs() -> None:
    named = {(file, name) for file, name, _ in named_tests()}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        file = path.relative_to(ROOT / "tests").as_posix()
        missing = {name for name in marked_long(path) if not {(file, name), (file, None)} & named}
        assert missing == set(), f"{file} is marked long: name it in docs/reliability.md, on a line with *long*"


@pytest.mark.parametrize(("file", "name", "is_long"), named_tests())
def test_a_promises_test_exists_and_runs_where_the_page_says(file: str, name: str | None, is_long: bool) -> None:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    marked = any("pytest.mark.long" in ast.unparse(n) for n in tree.body if isinstance(n, ast.Assign))
    if name is not None:
        (found,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name]
        marked = marked or any("mark.long" in ast.unparse(decorator) for decorator in found.decorator_list)
        assert marked == is_long, name
