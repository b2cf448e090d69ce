"""The wheel alone: built, installed beside the libraries that are here, and asked from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, for setuptools writes build/ and *.egg-info beside what it builds.
    source = folder / "source"
    source.mkdir()
    for name in ("diki_ray", "configs", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-a", str(ROOT / name), str(source / name)], check=True)
    program = (
        f"from setuptools import build_meta as b; print(b.build_wheel({str(folder)!r}), b.build_sdist({str(folder)!r}))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    (_,) = folder.glob("*.tar.gz")
    return built


def test_the_wheel_has_our_configurations_and_the_tiny_clip(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(n.removeprefix("diki_ray/configs/") for n in names if "/configs/" in n) == CONFIGURATIONS
    assert [n for n in names if n.startswith("diki_ray/assets/tiny_clip/") and n.endswith(".safetensors")]
    assert [n for n in names if n.split("/")[0] in ("jobs", "tests", "benchmarks")] == []


@pytest.fixture(scope="module")
def command(wheel: Path) -> Path:
    """`diki-ray` of an environment that has the wheel, and by a path file the libraries of this one."""
    venv = wheel.parent / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = venv / "lib" / version / "site-packages"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--prefix",
        str(venv),
        str(wheel),
    ]
    subprocess.run([*install, "--ignore-installed"], check=True, capture_output=True)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    script = venv / "bin" / "diki-ray"
    script.write_text(f"#!{venv}/bin/python\n" + script.read_text().partition("\n")[2])
    return script


def told(command: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH" and not n.startswith("DIKI_")}
    return subprocess.run(
        [command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_it_answers_from_an_empty_folder(command: Path, tmp_path: Path) -> None:
    shown = told(command, tmp_path, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "continual" in shown.stdout
    done = told(command, tmp_path, "continual", "--config", "quickstart", "train.epoch=1")
    assert done.returncode == 2
    assert str(command.parents[1]) in done.stderr  # the configuration is the wheel's
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_quickstart_from_the_wheel(command: Path, tmp_path: Path) -> None:
    done = told(command, tmp_path, "continual", "--config", "quickstart")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "storage/runs/quickstart/results/report.html").is_file()
