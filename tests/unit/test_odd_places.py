"""Working folders with spaces, quotes, newlines and what a shell would run in their names."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from stored_run import StoredRun, picture

import diki_ray
from diki_ray.commands.app import run as command
from diki_ray.report.next_steps import next_steps

NAMES = [
    "two\nlines",
    "$(touch ran) `touch ran`; & |",
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in ("a b", 'it\'s "quoted"', "grün 狐", "-rf", "[b]*?{x}#%20")
    ),
]


@pytest.mark.parametrize("name", NAMES)
def test_commands_work_where_names_are_odd_and_what_they_print_can_be_typed(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    run = StoredRun(folder, "warm")
    run.store.release(run.epoch)
    image = folder / f"{name}.png"
    picture("warm", 1).save(image)
    where = ["--storage", run.storage, "--run", "colours"]
    mine = ["--backbone", run.config.backbone.name]
    assert command("predict", [str(image), "--json", *where, *mine]) == 0
    assert json.loads(capsys.readouterr().out)[0]["image"] == str(image)
    assert command("predict", [str(image), *where, *mine]) == 0
    assert command("export", [str(folder / "bundle"), *where, *mine]) == 0
    assert command("report", ["colours", "--storage", run.storage, "--output", str(folder / "page.html")]) == 0
    assert command("store", ["verify", *where]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    answers = diki_ray.load(folder / "bundle", backbone=run.config.backbone.name).predict([image])
    assert answers[0].task == "warm"
    steps = next_steps(run.config, "…", None)
    typed = steps[steps.index("predict IMAGE") : steps.index("\nopen the report:")]
    arguments = ["predict", "IMAGE", *where, *mine]
    assert shlex.split(typed) == arguments
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {typed}"], capture_output=True, text=True, check=True)
    assert said.stdout.split("\0")[:-1] == arguments
    assert not list(tmp_path.rglob("ran"))
