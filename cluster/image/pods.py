"""The pods of an overlay as containers of Podman: what the rendered manifests say, and what KubeRay 1.7 adds to it.

Taken from the manifests: images, commands, environment, limits of processors and memory, user and groups, read-only
root file systems, dropped capabilities, volumes and where they are mounted, probes, grace periods. A field that is
neither done here nor named in NOT_DONE is an error, so that nothing of a manifest is passed over in silence.

KubeRay's part is written down here by its source (ray-operator/controllers/ray/common: pod.go, job.go): the line of
`ray start`, the environment that it gives, the submitter's command. Each pod has a network of its own.

Not emulated: the operator itself, the autoscaler (workers are started by hand), services and names (the head's stands
in each pod's /etc/hosts), the network policy, liveness probes' restarts, limits of ephemeral storage.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "build" / "image"
VOLUMES = OUTPUT / "volumes"
NETWORK = "diki-trial"
SUBNET = "10.213.80"
TOKEN = "a-token-of-this-trial-alone-0123456789abcdef"

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


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def run(*words: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command's result as text. With `check` a failure ends this process with what the command said."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if check and done.returncode != 0:
        sys.exit(f"{' '.join(words)[:300]}\nexit code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done


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


def quantity(text: str) -> float:
    """Kubernetes' "500m" or "4Gi" as a number."""
    number, unit = re.fullmatch(r"([\d.]+)(m|Ki|Mi|Gi|)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"m": 1e-3, "": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[unit]


def ulimits() -> list[str]:
    """Podman's own defaults may be more than this machine lets a process have."""
    files, processes = (resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    limits = {"nofile": min(files, 65536), "nproc": min(processes, 32768)}
    return [f"--ulimit={name}={limit}:{limit}" for name, limit in limits.items()]


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


@dataclass
class Cluster:
    """The pods of an overlay's cluster. `number` tells clusters that run side by side apart.

    Used as a context, which ends its pods; volumes of claims outlive it.
    """

    overlay: str
    number: int = 0
    secrets: dict[str, str] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    """Of each pod that was started and not ended."""
    _pods: dict[str, list[str]] = field(default_factory=dict)
    """The containers of each pod, Ray's first."""

    def __post_init__(self) -> None:
        self.name = f"diki{self.number}"
        self.head, self.head_ip = f"{self.name}-head", f"{SUBNET}.{10 + 20 * self.number}"
        self.head_name = f"{self.name}-head-svc.diki.svc.cluster.local"
        self.spec = cluster_of(self.overlay)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for pod in list(self._pods):
            self.kill(pod)

    def start_head(self) -> None:
        self._start_ray(self.head, self.spec["headGroupSpec"], 0)

    def start_worker(self, index: int) -> str:
        pod = f"{self.name}-worker{index}"
        self._start_ray(pod, self.spec["workerGroupSpecs"][0], index)
        return pod

    def _start_ray(self, pod: str, group: dict[str, Any], index: int) -> None:
        is_head = index == 0
        line = ray_start(group, None if is_head else self.head_name)
        given = {
            "RAY_CLUSTER_NAME": self.name,
            "RAY_CLOUD_INSTANCE_ID": pod,
            "RAY_NODE_TYPE_NAME": "headgroup" if is_head else group["groupName"],
            "KUBERAY_GEN_RAY_START_CMD": line,
            "RAY_PORT": "6379",
            "RAY_ADDRESS": "127.0.0.1:6379" if is_head else f"{self.head_name}:6379",
            "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
            "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
            **({"RAY_enable_autoscaler_v2": "true"} if is_head else {"FQ_RAY_IP": self.head_name}),
            **(KUBERAY_SERVICE if resource_of(self.overlay)["kind"] == "RayService" else {}),
            **self._token(),
        }
        command = ["/bin/bash", "-c", "--", f"ulimit -n 65536; {line}"]
        shared_memory = group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
        options = [f"--shm-size={int(quantity(shared_memory))}", *(f"--env={k}={v}" for k, v in given.items())]
        self._start_pod(pod, group["template"]["spec"], index, options, command)

    def _token(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": self.spec["authOptions"]["mode"], "RAY_AUTH_TOKEN": TOKEN}

    def _start_pod(self, pod: str, spec: dict[str, Any], index: int, options: list[str], command: list[str]) -> None:
        """Start a pod's containers: the first with these options and this command, the others in its network."""
        self._pods[pod] = []
        self.addresses[pod] = f"{SUBNET}.{10 + 20 * self.number + index}"
        network = [f"--network={NETWORK}", f"--ip={self.addresses[pod]}", f"--hostname={pod}"]
        network += [f"--add-host={self.head_name}:{self.head_ip}"]
        for container in spec["containers"]:
            self._pods[pod].append(f"{pod}-{container['name']}")
            *words, image = arguments(pod, spec, container, self.secrets)
            run("podman", "run", "--replace", *words, *network, *options, image, *(container.get("command") or command))
            network, options = [f"--network=container:{self._pods[pod][0]}"], []

    def submit(self, submission_id: str, *overrides: str) -> str:
        """Start the submitter of the overlay's job, as KubeRay's K8sJobMode does; the name of its pod."""
        job = resource_of(self.overlay)["spec"]
        address = f"--address http://{self.head_name}:8265"
        command = (
            f"if ! ray job status {address} {submission_id} >/dev/null 2>&1 ; "
            f"then ray job submit {address} --no-wait --submission-id {submission_id} -- "
            f"{' '.join([job['entrypoint'], *overrides])} ; fi ; ray job logs {address} --follow {submission_id}"
        )
        pod = f"{self.name}-submit-{submission_id}"
        given = {"PYTHONUNBUFFERED": "1", **self._token()}
        options = [f"--env={name}={value}" for name, value in given.items()]
        index = 10 + sum("-submit-" in name for name in self._pods)
        self._start_pod(pod, job["submitterPodTemplate"]["spec"], index, options, ["/bin/bash", "-ce", "--", command])
        return pod

    def wait_for(self, pod: str, *probes: str) -> float:
        """Ask these probes of a Ray pod, from outside as the kubelet does, until all are content; the seconds taken."""
        is_head = pod == self.head
        group = self.spec["headGroupSpec"] if is_head else self.spec["workerGroupSpecs"][0]
        container = group["template"]["spec"]["containers"][0]
        patience = container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"]
        asked = [container[probe]["httpGet"] for probe in probes]
        urls = [f"http://{self.addresses[pod]}:{one['port']}{one['path']}" for one in asked]
        began = time.monotonic()
        while not all(ask(url)[0] == 200 for url in urls):
            if time.monotonic() > began + patience or not self.is_running(pod):
                sys.exit(f"{pod} is not ready:\n{self.log(pod)[-3000:]}")
            time.sleep(1)
        return time.monotonic() - began

    def nodes_of(self, class_name: str) -> list[str]:
        """The pods that actors of this class live in, by Ray's state API."""
        by_address = {address: pod for pod, address in self.addresses.items()}
        pod_of = {node["node_id"]: by_address[node["node_ip"]] for node in self._listed("nodes")}
        actors = [actor for actor in self._listed("actors") if actor["state"] == "ALIVE"]
        return [pod_of[actor["node_id"]] for actor in actors if actor["class_name"] == class_name]

    def _listed(self, what: str) -> list[dict[str, Any]]:
        url = f"http://{self.head_ip}:8265/api/v0/{what}?limit=1000&detail=1"
        _, answer = ask(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
        return json.loads(answer)["data"]["result"]["result"]

    def is_running(self, pod: str) -> bool:
        state = run("podman", "inspect", "--format={{.State.Running}}", self._pods[pod][0]).stdout
        return state.strip() == "true"

    def log(self, pod: str) -> str:
        done = run("podman", "logs", self._pods[pod][0])
        return done.stdout + done.stderr

    def execute(self, *command: str) -> str:
        """What a command says in the head's container."""
        return run("podman", "exec", self._pods[self.head][0], *command).stdout

    def stop(self, pod: str) -> float:
        """SIGTERM and the pod's grace, as at an eviction; the seconds that it took."""
        began = time.monotonic()
        run("podman", "stop", *self._pods[pod])
        took = time.monotonic() - began
        self.kill(pod)
        return took

    def kill(self, pod: str) -> None:
        """SIGKILL to all of a pod, as when its machine is lost."""
        for container in reversed(self._pods.pop(pod)):  # the others use the first one's network
            run("podman", "rm", "--force", "--ignore", "--time=0", container)
        del self.addresses[pod]


def ask(
    url: str, body: bytes | None = None, headers: dict[str, str] | None = None, method: str = "", timeout: float = 10
) -> tuple[int, bytes]:
    """(status, body) of a request; the status is 0 where there was no answer."""
    request = urllib.request.Request(url, body, headers or {}, method=method or None)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""
