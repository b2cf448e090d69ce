"""Attacks with files: what people configure, prepare and hand in is a pipe, a device, gigabytes of nothing, no UTF-8, a
bomb. Each ends in a sentence, soon."""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diki_ray.clip.backbone import load as load_backbone
from diki_ray.config import load, parse
from diki_ray.config.sweep import load_sweep
from diki_ray.data import prepare
from diki_ray.data.index import DatasetIndex
from diki_ray.data.inputs import parts_of
from diki_ray.errors import ConfigError, DataError, StorageError, UserError
from diki_ray.prediction.run_predictor import read_image
from diki_ray.store.files import read_bytes
from diki_ray.store.objects import Objects
from diki_ray.store.run_store import RunStore

GOOD = "run: {name: r}\ntasks: [{data: 'embedded:digits'}]\n"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(50 * 2**30)


KINDS = [pipe, device, sparse]


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """Ten seconds of this process's own work: what waits for ever is ended by the suite, and machines are busy."""
    started = time.process_time()
    yield
    assert time.process_time() - started < 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["c.json", "c.yaml", "c.safetensors", "c.png", "c"])
def test_what_is_no_file_of_its_kind_is_not_read(tmp_path: Path, kind: Callable[[Path], None], name: str) -> None:
    kind(tmp_path / name)
    with pytest.raises(StorageError, match=f"cannot read .*{name}: it "):
        read_bytes(str(tmp_path / name))
    with pytest.raises(StorageError, match="cannot read"):
        Objects.open(str(tmp_path)).get(name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_is_a_file(tmp_path: Path, kind: Callable[[Path], None]) -> None:
    kind(tmp_path / "c.yaml")
    for read in (load, load_sweep):
        with pytest.raises(ConfigError, match=r"--config .*: it "):
            read(tmp_path / "c.yaml")


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_a_file(tmp_path: Path, kind: Callable[[Path], None]) -> None:
    kind(tmp_path / "x.png")
    with pytest.raises(UserError, match="cannot read"):
        read_image(str(tmp_path / "x.png"))
    (row,) = next(iter(parts_of([str(tmp_path / "x.png")]))).read()
    assert row.data is None
    assert row.error is not None
    assert "cannot read" in row.error


@pytest.mark.parametrize("kind", KINDS)
def test_an_import_reads_a_file(tmp_path: Path, kind: Callable[[Path], None]) -> None:
    kind(tmp_path / "run.tar")
    with pytest.raises(UserError, match=r"run\.tar"):
        RunStore.import_(str(tmp_path / "home"), "mine", str(tmp_path / "run.tar"))


def test_an_import_takes_no_member_of_gigabytes(tmp_path: Path) -> None:
    member = tarfile.TarInfo("runs/r/log/00000001.json")
    member.size = 3 * 2**30
    (tmp_path / "run.tar").write_bytes(member.tobuf())
    with (tmp_path / "run.tar").open("r+b") as file:
        file.truncate(member.size + 20_480)
    with pytest.raises(UserError, match="at most 67,108,864 are read"):
        RunStore.import_(str(tmp_path / "home"), "mine", str(tmp_path / "run.tar"))


def classes(folder: Path, *names: str | bytes) -> Path:
    for number, name in enumerate(names):
        target = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(target)
        for n in range(4):
            out = io.BytesIO()
            Image.new("RGB", (8, 8), (60 * number, 50 * n, 0)).save(out, "PNG")
            Path(os.fsdecode(target), f"{n}.png").write_bytes(out.getvalue())
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifests_lines_name_files(tmp_path: Path, kind: Callable[[Path], None]) -> None:
    folder = classes(tmp_path / "data", "a", "b")
    kind(folder / "theirs.png")
    lines = [f"{c}/{n}.png,{c}" for c in "ab" for n in range(4)]
    (folder / "list.csv").write_text("\n".join(["path,label", "theirs.png,a", *lines]) + "\n")
    plan = prepare.plan(str(folder / "list.csv"), str(tmp_path / "root"))
    results = [prepare.write_job(job) for job in plan.jobs]
    reasons = {reason for result in results for _, reason in result.skipped} | set(plan.raw.skipped)
    assert reasons & {"not a regular file", "unreadable (OSError)"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_is_a_file(tmp_path: Path, kind: Callable[[Path], None]) -> None:
    folder = classes(tmp_path / "data", "a", "b")
    kind(folder / "manifest.csv")
    if kind is not sparse:  # what is no file is no manifest
        assert prepare.plan(str(folder), str(tmp_path / "root")).raw.layout == "class folders"
        return
    with pytest.raises(DataError, match=r"cannot read manifest .*manifest\.csv"):
        prepare.plan(str(folder), str(tmp_path / "root"))


def test_class_folders_that_become_one_name_are_said(tmp_path: Path) -> None:
    folder = classes(tmp_path / "data", "red_fox", "red fox", "badger")
    with pytest.raises(DataError, match="'red fox' and 'red_fox' both become 'red fox'"):
        prepare.plan(str(folder), str(tmp_path / "root"))
    manifest = folder / "list.csv"
    manifest.write_text("path,label\nred_fox/0.png,red_fox\nred fox/0.png,red fox\n")
    with pytest.raises(DataError, match="both become 'red fox'"):
        prepare.plan(str(manifest), str(tmp_path / "root"))


def test_a_class_folder_that_is_not_utf8_is_said(tmp_path: Path) -> None:
    folder = classes(tmp_path / "data", b"caf\xe9", "tea")
    with pytest.raises(DataError, match=r"the class folder b'caf\\xe9' is not UTF-8: rename it"):
        prepare.plan(str(folder), str(tmp_path / "root"))


# Templates

BRACES = [
    "a {} {x}",
    "a {} }",
    "{ a {}",
    "{{}}",
    "{:>2000000000}",
    "{0} {}",
    "{!r} {}",
    "a",
    "{} {}",
    "a {}" + "x" * 1000,
]


@pytest.mark.parametrize("template", BRACES)
def test_no_template_that_would_fail_or_hang_later_is_taken(tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.0\.template: a template "):
        parse({"run": {"name": "r"}, "tasks": [{"data": "embedded:digits", "template": template}]})
    with pytest.raises(DataError, match=r"the template .* (needs|has)"):
        prepare.plan(str(classes(tmp_path / "data", "a", "b")), str(tmp_path / "root"), template=template)
    with pytest.raises(DataError, match=r"the template .* (needs|has)"):
        DatasetIndex("somewhere", "d", ("a",), (template,), "own", {})


# YAML

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{n}: &{n} [{', '.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefghij", "bcdefghijk", strict=True)
)
TREES = {
    "not UTF-8": (b"run: {name: caf\xe9}\n", "not UTF-8"),
    "a list": (b"- 1\n- 2\n", "is a list; a configuration is sections"),
    "a word": (b"hello\n", "is a str; a configuration is sections"),
    "a list as a key": (b"? [a, b]\n: c\n", "not YAML"),
    "itself": (b"run: &r {name: *r}\n", "refers to itself"),
    "a bomb": (BOMB.encode(), "more than 50,000 values"),
    "deep": (b"run: " + b"[" * 5000 + b"]" * 5000 + b"\n", "50 levels|nesting depth"),
    "a hundred thousand tasks": (
        b"run: {name: r}\ntasks:\n" + b"- {data: x}\n" * 100_000,
        "at most 1,048,576 are read",
    ),
    "thirty thousand tasks": (b"run: {name: r}\ntasks:\n" + b"- {data: x}\n" * 30_000, "more than 50,000 values"),
    "thirty thousand faults": (b"run: {name: r}\ntasks:\n" + b"- {dat: x}\n" * 30_000, "."),
    "nine thousand faults": (b"run: {name: r}\ntasks:\n" + b"- {dat: x}\n" * 9_000, "17,990 faults more"),
    "a long value": (b"run: {name: " + b"x" * 200_000 + b"}\n", r"run\.name"),
    "objects": (b"run: !!python/object/apply:os.system [exit]\n", "not YAML"),
    "zero byte": (b"run: \x00\n", "not YAML"),
    "a date": (b"2020-01-01: x\nrun: {name: r}\n", "."),
    "numbers as names": (b"1: x\nrun: {name: r}\n", "."),
    "the environment": (b"run: {name: r}\ntasks: [{data: '${oc.env:HOME}'}]\n", "would be computed"),
    "the environment, by a detour": (b"run: {name: oc.env}\ntasks: [{data: '${${run.name}:HOME}'}]\n", "computed"),
    "the environment, as a field's name": (b"run: {name: r}\n'${oc.env:HOME}': 1\n", "would be computed"),
    "code": (b"run: {name: '${oc.decode:x}'}\n", "would be computed"),
    "nowhere": (b"run: {name: '${train.nothing}'}\n", "not a valid configuration"),
    "in a circle": (b"run: {name: '${data.root}'}\ndata: {root: '${run.name}'}\n", "not a valid configuration"),
}


@pytest.mark.parametrize("name", TREES)
def test_no_tree_is_more_than_a_sentence(tmp_path: Path, name: str) -> None:
    content, says = TREES[name]
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as refused:
        load(path)
    assert len(str(refused.value)) < 3000
    with pytest.raises(ConfigError) as refused:
        load_sweep(path)
    assert len(str(refused.value)) < 3000


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tasks[0].shots=3", "the tasks are a list"),
        ("tasks.0.shots=3", "the tasks are a list|tasks"),
        ("run.name=${oc.env:HOME}", "would be computed"),
        ("tasks=[{data: '${oc.env:HOME}'}]", "would be computed"),
        ("run=3", "run"),
        ("run.name.x.y=3", "run"),
        ("train.lr=.nan", r"train\.lr"),
        ("train.lr=[", "not a valid configuration"),
        ("data.root=&a [*a]", "configuration"),
        ("\ud800=3", "."),
    ],
)
def test_no_override_is_more_than_a_sentence(tmp_path: Path, override: str, says: str) -> None:
    (tmp_path / "c.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=says) as refused:
        load(tmp_path / "c.yaml", [override])
    assert len(str(refused.value)) < 2000


def test_values_of_the_configuration_itself_are_still_taken(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(GOOD + "data: {root: 'prepared/${run.name}'}\n")
    assert load(tmp_path / "c.yaml").data.root == "prepared/r"


@pytest.mark.parametrize(
    "code", ["def create(:\n", "import nothing_of_that_name\n", "raise SystemExit(7)\n", "\x00", "1/0", "create = 3\n"]
)
def test_a_backbone_file_that_cannot_be_imported_is_a_sentence(tmp_path: Path, code: str) -> None:
    (tmp_path / "theirs.py").write_text(code)
    with pytest.raises(ConfigError, match=r"backbone\.name: ") as refused:
        load_backbone(str(tmp_path / "theirs.py"))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("place", [{"run": {"name": "x", "storage": "\udcff"}}, {"tasks": [{"data": "a\udcff"}]}])
def test_names_that_are_no_utf8_are_refused_before_anything_is_trained(place: dict[str, Any]) -> None:
    tree = {"run": {"name": "x"}, "tasks": [{"data": "embedded:gems"}]} | place
    with pytest.raises(ConfigError, match=r"\\udcff' is no UTF-8"):
        parse(tree)
