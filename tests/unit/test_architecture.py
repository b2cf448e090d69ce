"""The plan of the house: which room may use which, and what none of them does (docs/architecture.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import diki_ray

PACKAGE = Path(diki_ray.__file__).parent
ROOMS = (
    *("errors", "json_text", "regular_files"),
    *("config", "store", "clip", "learning", "answering", "data", "report"),
    *("runs", "prediction", "serving", "commands"),
)
"""Each room, a package or a file of its own, uses those before it and none after it."""
WITH_RAY = ("runs", "prediction", "serving", "commands")
WITHOUT_TORCH = ("errors", "json_text", "regular_files", "config", "store", "report")
HEAVY = ("torch", "open_clip", "torchvision")
ENTRIES = (PACKAGE / "__init__.py", PACKAGE / "__main__.py")
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path not in ENTRIES and "assets" not in path.parts)


def module_of(path: Path) -> str:
    return ".".join(("diki_ray", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imported(path: Path, everywhere: bool = True) -> Iterator[str]:
    """Every name that a file imports, in full; with `everywhere` also inside functions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is used"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "diki_ray" and len(parts) > 1 and parts[1] in ROOMS else None


def test_every_package_and_every_file_beside_them_is_a_room_of_the_plan() -> None:
    assert {module_of(path).split(".")[1] for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_one_way(path: Path) -> None:
    own = room_of(module_of(path))
    assert own is not None
    for name in imported(path):
        other = room_of(name)
        assert other is None or ROOMS.index(other) <= ROOMS.index(own), f"{path} imports {name}"
        assert name.split(".")[0] not in ("jobs", "benchmarks", "tests"), f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_above_the_runs_imports_ray(path: Path) -> None:
    if room_of(module_of(path)) not in WITH_RAY:
        assert [name for name in imported(path) if name.split(".")[0] == "ray"] == []


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_configuration_store_and_report_need_no_model(path: Path) -> None:
    if room_of(module_of(path)) in WITHOUT_TORCH:
        assert [name for name in imported(path) if name.split(".")[0] in HEAVY] == []


def test_no_import_is_dodged() -> None:
    assert [module_of(path) for path in FILES if "TYPE_CHECKING" in path.read_text()] == []


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        name: {
            found
            for target in imported(path)
            for found in (target, target.rpartition(".")[0])
            if found in MODULES and found != name
        }
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*way, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_hardly_a_file_is_longer_than_three_hundred_lines() -> None:
    lengths = {module_of(path): path.read_text().count("\n") for path in FILES}
    assert [name for name, lines in lengths.items() if lines > 400] == []
    assert sum(lines > 300 for lines in lengths.values()) <= len(lengths) // 20
