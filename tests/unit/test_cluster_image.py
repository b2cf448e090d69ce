"""The image that the overlays run: versions of the package, pinned dependencies, a build context with all it copies."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_overlays import (
    DEPENDENCIES,
    OVERLAYS,
    PYPROJECT,
    RAY_VERSION,
    ROOT,
    cuda_variant,
    dockerfile,
    pod_templates,
    ray_cluster,
)
from packaging.requirements import Requirement

import diki_ray

DOCKER = ROOT / "cluster" / "docker"
EXTRAS = {name: list(map(Requirement, wanted)) for name, wanted in PYPROJECT["optional-dependencies"].items()}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_and_ray_versions_are_those_of_the_package(overlay):
    assert ray_cluster(overlay)["rayVersion"] == RAY_VERSION
    images = {name: template["spec"]["containers"][0]["image"] for name, template in pod_templates(overlay)}
    images.pop("diki-redis", None)
    (image,) = set(images.values())  # Ray refuses a cluster of different versions
    variant = "cpu" if overlay.startswith("kind") else cuda_variant()
    assert image == f"diki-ray:{diki_ray.__version__}-{variant}"


def test_the_image_has_the_python_of_the_package_and_does_not_run_as_root():
    lines = [line for line in dockerfile().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if line.startswith("FROM")] == ["FROM python:3.11-slim-bookworm"]
    assert "3.11" in PYPROJECT["requires-python"]
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    assert set(re.findall(r"diki-ray:([\w.]+)-", dockerfile())) == {diki_ray.__version__}


def test_the_image_is_for_the_cpu_unless_asked_and_code_comes_after_what_it_needs():
    lines = dockerfile().splitlines()
    assert "ARG PLATFORM=cpu" in lines
    assert "ARG TORCH_INDEX=https://download.pytorch.org/whl/${PLATFORM}" in lines
    # Not as an extra index: where that is not reached, pip would take the CUDA wheels of PyPI.
    assert "extra-index-url" not in dockerfile()
    order = ["RUN pip install --no-deps --index-url", "RUN pip install --constraint", "COPY diki_ray diki_ray", "USER"]
    at = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert at == sorted(at)
    assert any("diki-ray --help" in line for line in lines[at[-1] :])


def smoke_test():
    """The Python of the smoke test, as a shell in the image reads it."""
    (code,) = re.findall(r'python -c "(.*?)"$', dockerfile(), re.DOTALL | re.MULTILINE)
    return code.replace("\\\n", "")


@pytest.mark.long
def test_the_smoke_test_within_the_build_passes_here_and_finds_a_package_without_its_configurations(tmp_path):
    command = [sys.executable, "-c", smoke_test()]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.startswith("torch")
    package = tmp_path / "diki_ray"
    shutil.copytree(ROOT / "diki_ray", package, ignore=shutil.ignore_patterns("configs", "__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "configs/quickstart.yaml" in done.stderr


def test_the_build_context_has_all_that_the_image_copies():
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", dockerfile(), re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert any(f"!{parent}" in ignored for parent in (source, *map(str, Path(source).parents))), source


def test_every_dependency_is_pinned_in_the_image_to_a_version_that_the_package_allows():
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pins = {r.name: next(iter(r.specifier)).version for r in (Requirement(s) for s in lines if not s.startswith("#"))}
    wanted = DEPENDENCIES | {r.name: r for name in EXTRAS.keys() - {"docs", "test"} for r in EXTRAS[name]}
    assert set(pins) == set(wanted)
    assert {n: v for n, v in pins.items() if not wanted[n].specifier.contains(v)} == {}


@pytest.mark.parametrize(("extras", "asked_for"), [("", "."), ("deepspeed,mlflow", ".[deepspeed,mlflow]")])
def test_the_image_installs_the_package_with_the_extras_that_are_named(extras, asked_for):
    (named,) = re.findall(r"EXTRAS=([\w,]+)", dockerfile())
    assert set(named.split(",")) <= set(EXTRAS)
    (install,) = re.findall(r"^RUN (pip install --constraint .*)", dockerfile(), re.MULTILINE)
    said = subprocess.run(["sh", "-c", f"echo {install}"], env={"EXTRAS": extras}, capture_output=True, text=True)
    assert said.stdout == f"pip install --constraint constraints.txt {asked_for}\n"
