"""Containers as Podman takes them: what the rendered manifests of an overlay say, and what KubeRay 1.7 adds to it.

Taken from the manifests: images, commands, environment, limits of processors and memory, user and groups, read-only
root file systems, dropped capabilities, volumes and where they are mounted, probes, grace periods. A field of a pod, a
container, its resources or a securityContext that is neither done here nor named in NOT_DONE is an error; what is
within volumes, mounts, environment and probes is not looked over in this way.

KubeRay's part is written down by its source (ray-operator/controllers/ray/common: pod.go, job.go).
"""

from __future__ import annotations

import functools
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from commands import OUTPUT, ROOT, run, ulimits

VOLUMES = OUTPUT / "volumes"
KUBERAY_WORKER = {"block": "true", "dashboard-agent-listen-port": "52365", "metrics-export-port": "8080"}
KUBERAY_HEAD = {**KUBERAY_WORKER, "dashboard-host": "0.0.0.0", "no-monitor": "true"}
KUBERAY_SERVICE = {
    "RAY_TIMEOUT_MS_TASK_WAIT_FOR_DEATH_INFO": "0",
    "RAY_GCS_SERVER_REQUEST_TIMEOUT_SECONDS": "5",
    "RAY_SERVE_KV_TIMEOUT_S": "5",
}
NOT_DONE = {
    *("serviceAccountName", "automountServiceAccountToken", "restartPolicy", "fsGroupChangePolicy"),
    *("imagePullPolicy", "ports", "livenessProbe", "ephemeral-storage", "requests"),
}


@functools.cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    text = run("kubectl", "kustomize", str(ROOT / "cluster" / "kuberay" / "overlays" / overlay)).stdout
    return [document for document in yaml.safe_load_all(text) if document]


def resource_of(overlay: str) -> dict[str, Any]:
    """Its RayJob or RayService."""
    (found,) = (thing for thing in rendered(overlay) if thing["kind"] in ("RayJob", "RayService"))
    return found


def cluster_of(overlay: str) -> dict[str, Any]:
    spec = resource_of(overlay)["spec"]
    return spec.get("rayClusterSpec") or spec["rayClusterConfig"]


def setting_of(overlay: str, field: str) -> str:
    """What the command of its RayJob sets a field of the configuration to."""
    words = resource_of(overlay)["spec"]["entrypoint"].split()
    (value,) = (word.partition("=")[2] for word in words if word.startswith(f"{field}="))
    return value


def served_by(overlay: str) -> dict[str, Any]:
    """The `serveConfigV2` of its RayService."""
    return yaml.safe_load(resource_of(overlay)["spec"]["serveConfigV2"])


def folder_of(overlay: str, path: str) -> Path:
    """Where a path below the head's mount of a claim lies here."""
    spec = cluster_of(overlay)["headGroupSpec"]["template"]["spec"]
    claims = {v["name"]: v["persistentVolumeClaim"] for v in spec["volumes"] if "persistentVolumeClaim" in v}
    (mount,) = (mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] in claims)
    return VOLUMES / claims[mount["name"]]["claimName"] / Path(path).relative_to(mount["mountPath"])


def quantity(text: str) -> float:
    """Kubernetes' "500m" or "4Gi" as a number."""
    number, unit = re.fullmatch(r"([\d.]+)(m|Ki|Mi|Gi|)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"m": 1e-3, "": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[unit]


def ray_start(group: dict[str, Any], head: str | None) -> str:
    """The line that KubeRay makes for a group of pods.

    Args:
        group: A `headGroupSpec`, or one of `workerGroupSpecs`.
        head: The address that workers join, without its port; None for the head itself.
    """
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    given = {
        **(KUBERAY_HEAD if head is None else {**KUBERAY_WORKER, "address": f"{head}:6379"}),
        "num-cpus": str(math.ceil(quantity(limits["cpu"]))),
        "memory": str(int(quantity(limits["memory"]))),
        **group["rayStartParams"],
    }
    options = [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in sorted(given.items())]
    return " ".join(["ray start", *(["--head"] if head is None else []), *options])


def take(wanted: dict[str, Any], *names: str) -> list[Any]:
    """The fields of these names, None for those that are not there; any other that matters is an error."""
    if unknown := wanted.keys() - {*names} - NOT_DONE:
        sys.exit(f"The manifests have fields that the trial does not do: {', '.join(sorted(unknown))} (pods.py).")
    return [wanted.get(name) for name in names]


def arguments(pod: str, spec: dict[str, Any], container: dict[str, Any], secrets: dict[str, str]) -> list[str]:
    """What `podman run` is told of one container of a pod's spec, but for its network and its command.

    Args:
        pod: The pod's name, which its own volumes carry.
        spec: A pod's spec.
        container: One of its containers.
        secrets: The value of each "secret/key" that the environment may name.
    """
    grace, of_pod, volumes, _ = take(spec, "terminationGracePeriodSeconds", "securityContext", "volumes", "containers")
    not_root, user, group, seccomp = take(of_pod, "runAsNonRoot", "runAsUser", "fsGroup", "seccompProfile")
    name, image, env, limits, security, mounts, _, work_dir, *_ = take(
        container,
        *("name", "image", "env", "resources", "securityContext", "volumeMounts", "command", "workingDir"),
        *("startupProbe", "readinessProbe"),
    )
    escalation, read_only, capabilities = take(
        security, "allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"
    )
    cpu, memory = take(take(limits, "limits")[0], "cpu", "memory")
    assert (not_root, escalation, read_only, capabilities) == (True, False, True, {"drop": ["ALL"]}), (pod, name)
    assert seccomp == {"type": "RuntimeDefault"}, pod  # which is Podman's default as well
    num_bytes = int(quantity(memory))
    words = [
        *("--detach", "--name", f"{pod}-{name}", *ulimits(), "--pids-limit=-1", f"--stop-timeout={grace or 30}"),
        *(f"--user={user}", f"--cpus={quantity(cpu)}", f"--memory={num_bytes}"),
        *("--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
        *([f"--group-add={group}"] if group else []),
        *([f"--workdir={work_dir}"] if work_dir else []),
    ]
    sources = {volume["name"]: _folder(pod, volume, group or 0) for volume in volumes}
    words += [f"--volume={sources[mount['name']]}:{mount['mountPath']}" for mount in mounts]
    for variable in env:
        value = variable.get("value")
        if value is None:
            reference = variable["valueFrom"]["secretKeyRef"]
            value = secrets[f"{reference['name']}/{reference['key']}"]
        words.append(f"--env={variable['name']}={value}")
    return [*words, f"localhost/{image}"]


def _folder(pod: str, volume: dict[str, Any], group: int) -> Path:
    """Where a volume lies here, with the rights of fsGroup: a claim for all pods, an empty directory for its pod."""
    claim = volume.get("persistentVolumeClaim")
    folder = VOLUMES / (claim["claimName"] if claim else f"{pod}-{volume['name']}")
    if not folder.exists():
        folder.mkdir(parents=True)
        _give_to_group(folder, group, 0o2775 if claim else 0o2777)
    return folder


def _give_to_group(folder: Path, group: int, mode: int) -> None:
    os.chown(folder, 0, group)
    folder.chmod(mode)
