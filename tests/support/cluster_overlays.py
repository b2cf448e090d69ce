"""The overlays of cluster/kuberay as kubectl renders them, and the commands and configurations of their jobs."""

import functools
import re
import shlex
import shutil
import subprocess
import tomllib
import warnings
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from diki_ray import config
from diki_ray.config.sweep import load_sweep

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
OVERLAYS = sorted(path.name for path in (KUBERAY / "overlays").iterdir())
JOB_OVERLAYS = [n for n in OVERLAYS if "/job\n" in (KUBERAY / "overlays" / n / "kustomization.yaml").read_text()]
SERVE_OVERLAYS = [n for n in OVERLAYS if "/serve\n" in (KUBERAY / "overlays" / n / "kustomization.yaml").read_text()]

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = {r.name: r for r in map(Requirement, PYPROJECT["dependencies"])}
RAY_VERSION = next(iter(DEPENDENCIES["ray"].specifier)).version


def tool(name, consequence):
    """The path of a program; without it the test is skipped, and says loudly what that means."""
    if (path := shutil.which(name)) is None:
        reason = f"{name} is not installed: {consequence}"
        warnings.warn(reason, stacklevel=2)
        pytest.skip(reason)
    return path


def render(folder):
    kubectl = tool("kubectl", "NOTHING under cluster/kuberay was rendered or checked")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@functools.cache
def rendered(overlay):
    return render(KUBERAY / "overlays" / overlay)


def of_kind(overlay, *kinds):
    return [thing for thing in rendered(overlay) if thing["kind"] in kinds]


def ray_cluster(overlay):
    """The spec of the RayCluster that is there itself, or as a RayJob's or a RayService's."""
    (thing,) = of_kind(overlay, "RayCluster", "RayJob", "RayService")
    spec = thing["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def command_of(overlay):
    """(script, --config, overrides) of a job. Two shells read the command: no word of it may mean a thing to them."""
    (job,) = of_kind(overlay, "RayJob")
    assert re.fullmatch(r"[\w./:= -]+", job["spec"]["entrypoint"])
    python, script, flag, path, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (python, flag) == ("python", "--config")
    return ROOT / script, ROOT / path, overrides


def configuration_of(overlay):
    """(configuration, jobs that run side by side) as the job's script reads them from its command."""
    script, path, overrides = command_of(overlay)
    if script.name == "sweep.py":
        sweep, varied = load_sweep(path, overrides)
        return varied, sweep.concurrent_trials
    return config.load(path, overrides), 1


def cuda_variant():
    (variant,) = set(re.findall(r"PLATFORM=(cu\d+)", dockerfile()))
    return variant


def dockerfile():
    return (ROOT / "cluster/docker/Dockerfile").read_text()


def pod_templates(overlay):
    """(what it is, pod template) of everything that becomes a pod."""
    cluster = ray_cluster(overlay)
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    for job in of_kind(overlay, "RayJob"):
        yield "submitter", job["spec"]["submitterPodTemplate"]
    for thing in of_kind(overlay, "Deployment", "StatefulSet", "Job", "DaemonSet"):
        yield thing["metadata"]["name"], thing["spec"]["template"]
