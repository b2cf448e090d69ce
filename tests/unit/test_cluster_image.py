"""The image that the overlays run: versions of the package, pinned dependencies, a build context with all it copies."""

import re
import subprocess
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


def test_the_image_is_pinned_to_the_ray_of_the_package_and_does_not_run_as_root():
    lines = [line for line in dockerfile().splitlines() if line and not line.startswith("#")]
    assert f"ARG RAY_VERSION={RAY_VERSION}" in lines
    assert "FROM rayproject/ray:${RAY_VERSION}-py311-${PLATFORM}" in lines
    assert "py311".replace("py3", "3.") in PYPROJECT["requires-python"]
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    assert set(re.findall(r"diki-ray:([\w.]+)-", dockerfile())) == {diki_ray.__version__}


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
