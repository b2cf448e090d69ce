"""What is printed, and where to: readers that go, streams closed or full, encodings, names that move cursors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from diki_ray.commands.output import console, print_json
from diki_ray.report.next_steps import typed_again
from diki_ray.runs.progress import Display

ROOT = Path(__file__).parents[2]
PRINTS_AND_WRITES = r"""
import sys
from pathlib import Path
from diki_ray.commands import app
from diki_ray.commands.output import console, print_text

@app.app.command()
def learn() -> None:
    for n in range(5_000):
        console().print("trained", n) if n % 2 else print_text("gr\xfcn \u2026")
        print("noise", file=sys.stderr)
    Path(sys.argv[2]).write_text("results")

sys.exit(app.run("learn", []))
"""


def learnt(tmp_path: Path, shell: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command that prints megabytes and then writes its results, started as `shell` says; "$@" is the command."""
    results = tmp_path / "results"
    words = (sys.executable, "-c", PRINTS_AND_WRITES, "x", str(results))
    done = subprocess.run(
        ["bash", "-c", shell, "-", *words], capture_output=True, env=os.environ | environment, timeout=120
    )
    assert results.read_text() == "results", done
    assert b"Traceback" not in done.stderr
    return done


@pytest.mark.parametrize(
    "shell",
    [
        pytest.param('"$@" 2>/dev/null | head -1; exit ${PIPESTATUS[0]}', marks=pytest.mark.long),
        pytest.param('"$@" 2>&1 >/dev/null | head -1; exit ${PIPESTATUS[0]}', marks=pytest.mark.long),
        '"$@" 2>&1 | true; exit ${PIPESTATUS[0]}',
        pytest.param('"$@" >&-', marks=pytest.mark.long),
        pytest.param('"$@" >&- 2>&-', marks=pytest.mark.long),
        '"$@" >&- 2>&- <&-',
    ],
)
def test_results_do_not_hang_on_a_reader(tmp_path: Path, shell: str) -> None:
    assert learnt(tmp_path, shell).returncode == 0


def test_a_line_is_in_a_log_file_as_soon_as_it_is_printed(tmp_path: Path) -> None:
    """As for sweeps, whose lines are minutes apart."""
    log = tmp_path / "log"
    reads = (
        "import sys; from diki_ray.commands.output import prepare_output; prepare_output(); print('a setting is done')"
    )
    reads += f"; sys.exit(0 if open({str(log)!r}).read() == 'a setting is done\\n' else 3)"
    with log.open("w") as file:
        assert subprocess.run([sys.executable, "-c", reads], stdout=file, timeout=120).returncode == 0


def test_a_full_disk_under_standard_output_costs_the_output_alone_and_is_said(tmp_path: Path) -> None:
    done = learnt(tmp_path, '"$@" >/dev/full')
    assert done.returncode == 2
    assert b"error: standard output or error could not be written" in done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.long),
        pytest.param({"LC_ALL": "C"}, marks=pytest.mark.long),
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        pytest.param({"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"}, marks=pytest.mark.long),
    ],
)
def test_no_encoding_fails_a_job(tmp_path: Path, environment: dict[str, str]) -> None:
    done = learnt(tmp_path, '"$@"', **environment)
    assert done.returncode == 0
    assert done.stdout.startswith((b"gr\\xfcn \\u2026\n", "grün …\n".encode()))
    assert done.stdout.count(b"\n") == 5_000


EVIL = "\x1b[2J\x9b31m\u202e[/b]\x07x"


def test_names_in_tables_and_progress_move_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=Text(EVIL))
    table.add_column(Text(EVIL))
    table.add_row(Text(EVIL))
    console().print(table)
    Display(console()).say(EVIL)
    shown = capsys.readouterr().out
    assert shown.count("\\x1b[2J") == 4
    assert "[/b]" in shown
    assert shown.replace("\n", "").isprintable()


def test_json_is_json_and_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    value = {EVIL: [EVIL, "grün \U0001f98a \ue000 \U000e0001"]}
    print_json(value)
    shown = capsys.readouterr().out
    assert json.loads(shown) == value
    assert "grün 🦊" in shown
    assert shown.replace("\n", "").isprintable()
    with pytest.raises(ValueError, match="JSON"):
        print_json(float("nan"))


def test_a_command_that_is_no_utf8_fails_no_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/continual.py", "--storage", os.fsdecode(b"runs/\xff \xe9'\n")])
    command = typed_again(sys.argv)
    assert b"jobs/continual.py --storage 'runs/\\udcff \\udce9'" in command.encode()
