"""The cluster of overlays/kind and the service of overlays/kind-serve, run from the image in containers: `make image`,
second half, after build.py; `trial.py job` or `trial.py serve` for one of them (serve needs what job left).

The pods are those of the rendered manifests (manifests.py; pods.py says what is not emulated). Tried, each with an
assertion: the job; the same again; a worker's machine lost; the head lost; where the store is; the service with and
without its token; an upgrade to a second cluster, of another image, while clients ask. What was seen goes into
build/image/trial.json.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple

from build import IMAGE
from commands import OUTPUT, ask, run, say
from manifests import VOLUMES, cluster_of, folder_of, resource_of, served_by, setting_of
from pods import NETWORK, SUBNET, TOKEN, Cluster

EPOCH = re.compile(r"\[(\d)/\d\] (\w+)  epoch (\d+)/\d+")
STORAGE = setting_of("kind", "run.storage")
DISTURBED = f"{STORAGE}-disturbed"
"""The same job's results when it is disturbed. Nothing that is known in the first storage is taken from there."""
SERVE_TOKEN = "another-token-of-this-trial-0123456789"
RUN = served_by("kind-serve")["applications"][0]["args"]["run"]
(WORKERS,) = cluster_of("kind-serve")["workerGroupSpecs"]
PORT = WORKERS["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["port"]
"""What a worker is ready on is what clients ask."""
NEW_IMAGE = f"localhost/{IMAGE}-new"
NUM_CLIENTS = 4
REPORTS_S = 5
"""Longer than the line of an epoch that ended before a worker was killed takes to the log."""
CLUSTER_DELETION_DELAY_S = 10
"""Between the move of the service and the end of the old cluster. KubeRay's is 60."""


def main() -> None:
    parts = sys.argv[1:] or ["job", "serve"]
    seen: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%d")}
    say(
        "Emulated: what KubeRay and the kubelet do with pods. NOT emulated: the operator itself, the autoscaler, "
        "services, host names, the network policy, restarts by liveness probes, limits of ephemeral storage."
    )
    with network():
        if "job" in parts:
            shutil.rmtree(VOLUMES, ignore_errors=True)
            seen |= undisturbed() | disturbed()
        if "serve" in parts:
            seen |= served()
    file = OUTPUT / "trial.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | seen, indent=1))
    say(f"all of it as it should be: {json.dumps(seen, indent=1)}")


@contextmanager
def network() -> Iterator[None]:
    run("podman", "network", "rm", "--force", NETWORK, check=False)
    run("podman", "network", "create", "--disable-dns", f"--subnet={SUBNET}.0/24", NETWORK)
    try:
        yield
    finally:
        run("podman", "network", "rm", "--force", NETWORK)


# The job


def undisturbed() -> dict[str, Any]:
    """The job, where its store is, and the same again."""
    job_id = resource_of("kind")["spec"]["jobId"]
    with Cluster("kind") as cluster:
        begin(cluster)
        began = time.monotonic()
        submitter = cluster.submit(job_id)
        wait_for_epoch(cluster, submitter, task=1, epoch=1)
        assert_the_store_is_on_the_head(cluster)
        log = wait_for_end(cluster, submitter)
        took = time.monotonic() - began
        learnt = digests(cluster, STORAGE)
        say(f"learnt {len(learnt)} tasks in {took:.0f} s")

        began = time.monotonic()
        again = wait_for_end(cluster, cluster.submit(f"{job_id}-again"))
        assert epochs(again) == [], "the same job again trained something"
        assert digests(cluster, STORAGE) == learnt
        assert last_of(again) == last_of(log)
    return {
        "job_s": round(took),
        "last": last_of(log),
        "digests": learnt,
        "again_s": round(time.monotonic() - began),
    }


def disturbed() -> dict[str, Any]:
    """The same job from nothing, a worker's machine lost in its second task, the head in its fourth: equal modules."""
    job_id = resource_of("kind")["spec"]["jobId"]
    with Cluster("kind") as cluster:
        workers = begin(cluster)
        expected = digests(cluster, STORAGE)
        submitter = cluster.submit(job_id, f"run.storage={DISTURBED}")
        wait_for_epoch(cluster, submitter, task=2, epoch=3)
        lost = cluster.nodes_of("RayTrainWorker")[0]
        say(f"killing {lost}")
        began = time.monotonic()
        cluster.kill(lost)
        workers = [pod for pod in workers if pod != lost] + [cluster.start_worker()]
        time.sleep(REPORTS_S)
        lines = len(epochs(cluster.log(submitter)))
        cluster.wait(submitter, "other epoch", lambda: len(epochs(cluster.log(submitter))) > lines)
        worker_s = time.monotonic() - began
        say(f"trained on after {worker_s:.0f} s")

        wait_for_epoch(cluster, submitter, task=4, epoch=2)
        under_way = epochs(cluster.log(submitter))[-1].task
        say("killing the head")
        began = time.monotonic()
        lose_head(cluster, submitter, workers)
        submitter = cluster.submit(job_id, f"run.storage={DISTURBED}")
        wait_for_epoch(cluster, submitter, task=1, epoch=1)
        head_s = time.monotonic() - began
        first = epochs(cluster.log(submitter))[0]
        say(f"trained on after {head_s:.0f} s, with epoch {first.number} of {first.task}")
        assert first.task == under_way, f"{under_way} was being learnt"
        assert first.number > 1, "it began the task anew, not from its checkpoint"
        assert_the_store_is_on_the_head(cluster)
        wait_for_end(cluster, submitter)
        assert digests(cluster, DISTURBED) == expected, "other modules than without the losses"
    return {"after_worker_lost_s": round(worker_s), "after_head_lost_s": round(head_s)}


def begin(cluster: Cluster, num_workers: int = 2) -> list[str]:
    """Start the head and then the workers, as their `wait-gcs-ready` makes them wait; the workers' pods."""
    cluster.start_head()
    head_s = cluster.wait_for(cluster.head, "startupProbe", "readinessProbe", "livenessProbe")
    workers = [cluster.start_worker() for _ in range(num_workers)]
    worker_s = max(cluster.wait_for(pod, "startupProbe", "livenessProbe") for pod in workers)
    say(f"{cluster.name}: the head is there after {head_s:.0f} s, {num_workers} worker(s) {worker_s:.0f} s later")
    assert ask(f"http://{cluster.head_ip}:8265/api/jobs/")[0] == 401, "the jobs API answers without the token"
    return workers


def lose_head(cluster: Cluster, submitter: str, workers: list[str]) -> None:
    """Lose the head's machine, and do what KubeRay does: a new head, a new pod for each that ends."""
    began = time.monotonic()
    cluster.kill(cluster.head)
    cluster.start_head()
    for pod in workers:
        cluster.wait_for_end(pod, patience_s=300)
        cluster.kill(pod)
    say(f"the old workers had ended after {time.monotonic() - began:.0f} s")
    cluster.wait_for(cluster.head, "startupProbe")
    for _ in workers:
        cluster.start_worker()
    cluster.wait_for_end(submitter, patience_s=300)
    cluster.kill(submitter)
    say(f"the submitter had ended after {time.monotonic() - began:.0f} s")


class Epoch(NamedTuple):
    """A line of the job's log: the task's place among those to be learnt, its name, the number of the epoch."""

    place: int
    task: str
    number: int


def epochs(log: str) -> list[Epoch]:
    return [Epoch(int(match[1]), match[2], int(match[3])) for match in EPOCH.finditer(log)]


def wait_for_epoch(cluster: Cluster, submitter: str, task: int, epoch: int) -> None:
    """Wait until the log has this epoch of the task at this place, or a later one."""

    def is_there() -> bool:
        return any(one[::2] >= (task, epoch) for one in epochs(cluster.log(submitter)))

    cluster.wait(submitter, f"epoch {epoch} of task {task}", is_there)


def wait_for_end(cluster: Cluster, submitter: str) -> str:
    """Wait until the submitter has ended well; the job's log."""
    code = cluster.wait_for_end(submitter)
    log = cluster.log(submitter)
    if code != 0 or "Last" not in log:
        sys.exit(f"{submitter} ended with {code}:\n{log[-4000:]}")
    return log


def last_of(log: str) -> float:
    (last,) = re.findall(r"│ Last .*│ +([\d.]+) │", log)
    return float(last)


def digests(cluster: Cluster, storage: str) -> dict[str, str]:
    told = cluster.execute("diki-ray", "store", "list", "--storage", storage, "--run", RUN, "--json")
    return {module["task"]: module["digest"] for module in json.loads(told)["modules"]}


def assert_the_store_is_on_the_head(cluster: Cluster) -> None:
    assert cluster.nodes_of("StoreActor") == [cluster.head], cluster.nodes_of("StoreActor")
    assert set(cluster.nodes_of("RayTrainWorker")) <= cluster.addresses.keys() - {cluster.head}


# The service


def served() -> dict[str, Any]:
    """The service, with and without its token, and a second cluster, of a new image, that takes over while clients
    ask."""
    secrets = {"diki-serve/token": SERVE_TOKEN}
    make_new_image()
    with Cluster("kind-serve", 0, secrets) as old, Cluster("kind-serve", 1, secrets, NEW_IMAGE) as new:
        began = time.monotonic()
        (worker,) = serve(old)
        ready_s = time.monotonic() - began
        images = gems()
        clients = Clients(old.addresses[worker], images)
        url = f"http://{old.addresses[worker]}:{PORT}/predict"
        for header in ({}, {"Authorization": "Bearer wrong"}):
            assert ask(url, b"{}", {"Content-Type": "application/json", **header})[0] == 401
        with clients.asking():
            time.sleep(5)
            say(f"{len(clients.answers)} answers; an upgrade begins: a second cluster")
            before = len(clients.answers)
            began = time.monotonic()
            (successor,) = serve(new)
            assert new.image_of(successor) != old.image_of(worker), "both clusters run the same image"
            clients.address = new.addresses[successor]  # the service's selector, as KubeRay moves it
            upgrade_s = time.monotonic() - began
            time.sleep(CLUSTER_DELETION_DELAY_S)
            drain_s = old.stop(worker)
            old.kill(old.head)
            during = len(clients.answers) - before
            time.sleep(5)
        count = Counter(clients.answers)
        say(f"{count}; {during} while the second cluster came and the first went")
        assert set(count) <= {"right", "wrong"}, count
        assert count["right"] > 0.95 * count.total(), count
    return {
        "service_ready_s": round(ready_s),
        "upgrade_s": round(upgrade_s),
        "old_worker_ended_s": round(drain_s),
        "asked": count.total(),
        "asked_during_upgrade": during,
        "unanswered": count.total() - count["right"] - count["wrong"],
        "right": round(count["right"] / count.total(), 3),
    }


def make_new_image() -> None:
    """The image with a label more: the same files, and by its identity another image."""
    container = run("buildah", "from", f"localhost/{IMAGE}").stdout.strip()
    run("buildah", "config", "--label", "diki-ray.trial=new", container)
    run("buildah", "commit", "--quiet", container, NEW_IMAGE)
    run("buildah", "rm", container)


def serve(cluster: Cluster) -> list[str]:
    """Start a cluster and, as the operator does, put the application to its dashboard; its workers, ready."""
    workers = begin(cluster, num_workers=1)
    config = served_by(cluster.overlay)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    url = f"http://{cluster.head_ip}:8265/api/serve/applications/"
    status, said = ask(url, json.dumps(config).encode(), headers, "PUT", timeout=60)
    assert status == 200, (status, said)
    for worker in workers:
        cluster.wait_for(worker, "readinessProbe")
    say(f"{cluster.name} is ready to answer")
    return workers


def gems() -> list[tuple[bytes, str]]:
    """Images of the gems' test set with their class names, as the job prepared them."""
    (folder,) = folder_of("kind", setting_of("kind", "data.root")).glob("gems-*")
    classes = json.loads((folder / "index.json").read_text())["class_names"]
    with tarfile.open(next(folder.glob("test*.tar"))) as shard:
        content = {member.name: shard.extractfile(member).read() for member in shard if member.isfile()}  # type: ignore[union-attr]
    labels = {name.rpartition(".")[0]: int(value) for name, value in content.items() if name.endswith(".cls")}
    images = {name.rpartition(".")[0]: value for name, value in content.items() if not name.endswith((".cls", ".json"))}
    return [(image, classes[labels[key]]) for key, image in images.items()]


class Clients:
    """Ask for one image after the other, side by side; `answers` says of each request what came of it."""

    def __init__(self, address: str, images: list[tuple[bytes, str]]) -> None:
        self.address, self.answers = address, list[str]()
        self._images, self._stop = images, threading.Event()

    @contextmanager
    def asking(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _ask(self, number: int) -> None:
        headers = {"Authorization": f"Bearer {SERVE_TOKEN}", "Content-Type": "application/json"}
        while not self._stop.wait(0.1):
            image, right = self._images[number % len(self._images)]
            number += NUM_CLIENTS
            body = json.dumps({"images": [base64.b64encode(image).decode()]}).encode()
            status, said = ask(f"http://{self.address}:{PORT}/predict", body, headers, timeout=40)
            if status != 200:
                self.answers.append(f"status {status}")
                continue
            self.answers.append("right" if json.loads(said)["answers"][0]["class_name"] == right else "wrong")


if __name__ == "__main__":
    main()
