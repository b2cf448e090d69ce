"""The pods of an overlay's cluster, each with a network of its own, as KubeRay 1.7 and the kubelet would run them.

Not emulated: the operator itself, the autoscaler (workers are started by hand), services and names (the head's stands
in each pod's /etc/hosts), the network policy, liveness probes' restarts, limits of ephemeral storage.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from commands import ask, run
from manifests import KUBERAY_SERVICE, arguments, cluster_of, quantity, ray_start, resource_of

NETWORK = "diki-trial"
SUBNET = "10.213.80"
TOKEN = "a-token-of-this-trial-alone-0123456789abcdef"


@dataclass
class Cluster:
    """The pods of an overlay's cluster. `number` tells clusters that run side by side apart.

    Used as a context, which ends its pods; volumes of claims outlive it.
    """

    overlay: str
    number: int = 0
    secrets: dict[str, str] = field(default_factory=dict)
    image: str | None = None
    """What all its containers run in place of the manifests' image, as after an upgrade."""
    addresses: dict[str, str] = field(default_factory=dict)
    """Of each pod that was started and not ended."""
    _pods: dict[str, list[str]] = field(default_factory=dict)
    """The containers of each pod, Ray's first."""

    def __post_init__(self) -> None:
        self.name = f"diki{self.number}"
        self._num_started, self._base = 0, 10 + 20 * self.number  # of the last pod that was started; of addresses
        self.head, self.head_ip = f"{self.name}-head", f"{SUBNET}.{self._base}"
        self.head_name = f"{self.name}-head-svc.diki.svc.cluster.local"
        self.spec = cluster_of(self.overlay)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for pod in list(self._pods):
            self.kill(pod)

    def start_head(self) -> None:
        self._start_ray(self.head, self.spec["headGroupSpec"])

    def start_worker(self) -> str:
        self._num_started += 1
        pod = f"{self.name}-worker{self._num_started}"
        self._start_ray(pod, self.spec["workerGroupSpecs"][0])
        return pod

    def _start_ray(self, pod: str, group: dict[str, Any]) -> None:
        is_head = pod == self.head
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
        self._start_pod(pod, group["template"]["spec"], options, command)

    def _token(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": self.spec["authOptions"]["mode"], "RAY_AUTH_TOKEN": TOKEN}

    def _start_pod(self, pod: str, spec: dict[str, Any], options: list[str], command: list[str]) -> None:
        """Start a pod's containers: the first with these options and this command, the others in its network."""
        self._pods[pod] = []
        # A new pod has a new address; the head's is that of its service.
        self.addresses[pod] = self.head_ip if pod == self.head else f"{SUBNET}.{self._base + self._num_started}"
        network = [f"--network={NETWORK}", f"--ip={self.addresses[pod]}", f"--hostname={pod}"]
        network += [f"--add-host={self.head_name}:{self.head_ip}"]
        for container in spec["containers"]:
            self._pods[pod].append(f"{pod}-{container['name']}")
            *words, image = arguments(pod, spec, container, self.secrets)
            own = container.get("command") or command
            run("podman", "run", "--replace", *words, *network, *options, self.image or image, *own)
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
        self._num_started += 1
        self._start_pod(pod, job["submitterPodTemplate"]["spec"], options, ["/bin/bash", "-ce", "--", command])
        return pod

    def wait_for(self, pod: str, *probes: str) -> float:
        """Ask these probes of a Ray pod, from outside as the kubelet does, until all are content; the seconds taken."""
        is_head = pod == self.head
        group = self.spec["headGroupSpec"] if is_head else self.spec["workerGroupSpecs"][0]
        container = group["template"]["spec"]["containers"][0]
        patience_s = container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"]
        asked = [container[probe]["httpGet"] for probe in probes]
        urls = [f"http://{self.addresses[pod]}:{one['port']}{one['path']}" for one in asked]
        return self.wait(pod, f"content {probes}", lambda: all(ask(url)[0] == 200 for url in urls), patience_s)

    def wait(self, pod: str, what: str, is_so: Callable[[], bool], patience_s: float = 1200) -> float:
        """Wait until it is so, while the pod runs; the seconds taken. Otherwise this ends with the pod's log."""
        began = time.monotonic()
        while not is_so():
            if time.monotonic() > began + patience_s or not self.is_running(pod):
                sys.exit(f"{pod} ended, or for {patience_s:.0f} s it had no {what}:\n{self.log(pod)[-4000:]}")
            time.sleep(1)
        return time.monotonic() - began

    def wait_for_end(self, pod: str, patience_s: float = 1200) -> int:
        """The exit code of a pod that ends by itself."""
        deadline = time.monotonic() + patience_s
        while self.is_running(pod):
            if time.monotonic() > deadline:
                sys.exit(f"{pod} has not ended after {patience_s:.0f} s:\n{self.log(pod)[-4000:]}")
            time.sleep(1)
        return int(run("podman", "inspect", "--format={{.State.ExitCode}}", self._pods[pod][0]).stdout)

    def nodes_of(self, class_name: str) -> list[str]:
        """The pods that actors of this class live in, by Ray's state API."""
        by_address = {address: pod for pod, address in self.addresses.items()}
        pod_of = {node["node_id"]: by_address.get(node["node_ip"], "lost") for node in self._listed("nodes")}
        actors = [actor for actor in self._listed("actors") if actor["state"] == "ALIVE"]
        return [pod_of[actor["node_id"]] for actor in actors if actor["class_name"] == class_name]

    def _listed(self, what: str) -> list[dict[str, Any]]:
        url = f"http://{self.head_ip}:8265/api/v0/{what}?limit=1000"
        _, answer = ask(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
        return json.loads(answer)["data"]["result"]["result"]

    def image_of(self, pod: str) -> str:
        """The identity of the image that the pod's first container runs."""
        return run("podman", "inspect", "--format={{.Image}}", self._pods[pod][0]).stdout.strip()

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
