"""The store as a Ray actor: killed, restarted, overtaken, abandoned, on one real local cluster."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import ray

from diki_ray.errors import CorruptError, FencedError, LeaseHeldError, StorageError, UserError
from diki_ray.runs.store_client import NAMESPACE, RunHandle, StoreClient, actor_name
from diki_ray.store.objects import Objects
from diki_ray.store.run_store import RunStore

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
BLOB = b"prompts" * 200_000  # as large as a module


@pytest.fixture(autouse=True)
def on_the_cluster(local_cluster):
    """Every test here: only actors of its own storage are killed."""


@pytest.fixture
def storage(tmp_path) -> str:
    return str(tmp_path / "storage")


@pytest.fixture
def start(storage):
    clients = []

    def start_one(**options) -> StoreClient:
        clients.append(StoreClient.start(storage, "run", **options))
        return clients[-1]

    yield start_one
    for client in clients:
        client.stop()


def killing_objects(marker: Path, moment: str):
    """Storage for an actor that kills itself with SIGKILL at a moment, once: `marker` remembers that it did.

    A closure, so that it travels to the actor by value.
    """

    def open_objects(uri: str) -> Objects:
        import os
        import signal
        from pathlib import Path

        from diki_ray.store.objects import LocalObjects

        class Killing(LocalObjects):
            def put(self, path, data, create_only=False):
                if moment == "before-log-entry":
                    self._die(path)
                result = super().put(path, data, create_only)
                if moment == "after-log-entry":
                    self._die(path)
                return result

            def _die(self, path):
                if "/log/" in path and not path.endswith("00000001.json") and not Path(marker).exists():
                    Path(marker).touch()
                    os.kill(os.getpid(), signal.SIGKILL)

        return Killing(uri)

    return open_objects


def test_a_run_through_the_actor(start, storage):
    client = start()
    entry = client.commit_module("k", "aircraft", BLOB, {"num_classes": 100})
    assert RunStore.open(storage, "run").modules() == (entry,) == client.modules()
    assert client.read_module(entry.digest) == BLOB
    assert client.module_by_key("k") == BLOB
    assert client.find_in_library("k") == entry.digest
    assert client.find_in_library("other") is None
    assert client.adopt_module("k", "aircraft") == entry
    assert client.adopt_module("other", "aircraft") is None
    client.save_checkpoint("k2", 10, b"state", {"epoch": 1})
    assert client.load_checkpoint("k2") == (10, b"state", {"epoch": 1})
    client.drop_checkpoints("k2")
    assert client.load_checkpoint("k2") is None
    client.put_document("results.json", {"average": 0.5})
    assert client.get_document("results.json") == {"average": 0.5}
    assert client.damaged_modules() == ()
    version, modules = client.snapshot()
    assert (version, modules) == client.snapshot() == (entry.seq, (entry,))
    replaced = client.commit_module("k3", "aircraft", BLOB + b"again")
    assert client.snapshot() == (version + 1, (replaced,))
    assert RunStore.open(storage, "run").verify() == ()
    assert client.status()["num_modules"] == 1
    assert client.status()["driver_pid"] == os.getpid()


def test_workers_reach_the_store_through_a_copy_of_the_client(start):
    client = start()

    @ray.remote(num_cpus=0.1)
    def work(client: StoreClient, number: int) -> str:
        client.record_progress({"worker": number, "loss": 1.0 / (1 + number)})
        return client.commit_module(f"k{number}", f"task {number}", BLOB + b"%d" % number).digest

    digests = ray.get([work.remote(client, number) for number in range(4)])
    assert sorted(digests) == sorted(entry.digest for entry in client.modules())
    until = time.monotonic() + 10
    while len(client.progress()[1]) < 4 and time.monotonic() < until:
        time.sleep(0.05)
    following, events = client.progress()
    assert sorted(event["worker"] for event in events) == [0, 1, 2, 3]
    client.record_progress({"worker": 4})
    while client.progress()[0] == following and time.monotonic() < until:
        time.sleep(0.05)
    assert client.progress(following)[1] == [{"worker": 4}]


def test_errors_cross_the_actor_as_themselves(start, storage):
    client = start()
    with pytest.raises(UserError, match="is no module key") as caught:
        client.adopt_module("../k", "task")
    assert type(caught.value) is UserError
    entry = client.commit_module("k", "task", BLOB)
    Path(storage, "library/modules", f"{entry.digest}.safetensors").write_bytes(BLOB[:1000])
    with pytest.raises(CorruptError, match="is damaged") as caught:
        client.module_by_key("k")
    assert type(caught.value) is CorruptError
    assert client.status()["corrupt_modules"] == 1
    with pytest.raises(ValueError, match="not JSON compliant"):  # a defect of the caller: no retries, at once
        client.commit_module("nan", "task", BLOB, {"loss": float("nan")})


@pytest.mark.parametrize("moment", ["before-log-entry", "after-log-entry"])
def test_an_actor_killed_between_durable_write_and_reply_commits_once(start, storage, tmp_path, moment):
    marker = tmp_path / "killed"
    client = start(objects=killing_objects(marker, moment))
    pid = client.status()["pid"]
    started = time.monotonic()
    entry = client.commit_module("k", "task", BLOB)
    assert marker.exists()
    assert client.status()["pid"] != pid
    assert time.monotonic() - started < 30
    assert RunStore.open(storage, "run").modules() == (entry,) == client.modules()
    assert (entry.seq, entry.epoch) == (2, client.handle.epoch)
    assert client.commit_module("k", "task", BLOB) == entry


def test_readers_and_writers_wait_while_the_actor_restarts_in_the_same_epoch(start):
    client = start()
    entries = [client.commit_module(f"k{i}", f"task {i}", b"%d" % i) for i in range(3)]
    reader, read, failures = StoreClient(client.handle), [], []

    def read_on():
        while len(read) < 200:
            try:
                read.append((reader.snapshot()[1], reader.read_module(entries[0].digest)))
            except Exception as error:
                failures.append(error)
                return

    thread = threading.Thread(target=read_on)
    thread.start()
    for _ in range(2):
        os.kill(client.status()["pid"], signal.SIGKILL)
        started = time.monotonic()
        entries.append(client.commit_module(f"k{len(entries)}", f"task {len(entries)}", BLOB))
        assert time.monotonic() - started < 20
    thread.join(60)
    assert failures == []
    assert len(read) == 200
    assert all(blob == b"0" for _, blob in read)
    sizes = [len(modules) for modules, _ in read]
    assert sizes == sorted(sizes)  # nobody sees an acknowledged module vanish
    assert client.modules() == tuple(entries)
    assert {entry.epoch for entry in entries} == {client.handle.epoch}


def test_a_second_driver_is_refused_and_the_first_goes_on(start):
    client = start()
    pid = client.status()["pid"]
    started = time.monotonic()
    with pytest.raises(LeaseHeldError, match=r"held by .*run.take_over=true"):
        start()
    assert time.monotonic() - started < 5
    assert client.status()["pid"] == pid
    client.commit_module("k", "task", BLOB)


def test_an_overtaken_drivers_late_write_is_fenced_off(start, storage):
    zombie = start()
    kept = zombie.commit_module("k", "task", BLOB)
    worker = StoreClient(zombie.handle)
    successor = start(take_over=True)
    for late in (zombie, worker):
        with pytest.raises(FencedError, match="took it over"):
            late.commit_module("late", "late", BLOB)
        with pytest.raises(FencedError, match="took it over"):  # and it knows by itself from then on
            late.drop_checkpoints("late")
    zombie.stop()  # must not end the successor's actor
    assert successor.modules() == (kept,) == RunStore.open(storage, "run").modules()
    successor.commit_module("k2", "next", BLOB)


def test_an_idle_overtaken_driver_learns_of_it_by_its_heartbeat(start):
    zombie = start(ttl_s=0.6)
    start(take_over=True)
    until = time.monotonic() + 10
    while zombie._lost is None and time.monotonic() < until:
        time.sleep(0.05)
    with pytest.raises(FencedError):
        zombie.put_document("results.json", {})


def test_a_killed_driver_is_followed_at_once_and_its_actor_ended(local_cluster, start, storage):
    script = textwrap.dedent("""
        import os, signal, sys, ray
        from diki_ray.runs.store_client import StoreClient
        ray.init(address=sys.argv[1], log_to_driver=False)
        client = StoreClient.start(sys.argv[2], "run", ttl_s=1000.0)
        client.commit_module("k", "task", b"by the first driver")
        print(client.status()["pid"], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    command = [sys.executable, "-c", script, local_cluster, storage]
    dead = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, cwd=ROOT)
    assert dead.returncode == -signal.SIGKILL
    pid = int(dead.stdout)
    assert ray.get_actor(actor_name(storage, "run"), NAMESPACE)  # it outlived its driver
    started = time.monotonic()
    client = start()
    assert time.monotonic() - started < 30
    assert client.handle.epoch == 2
    assert client.status()["pid"] != pid
    assert client.module_by_key("k") == b"by the first driver"


def test_the_driver_starts_its_actor_again_when_someone_ended_it(start, storage):
    client = start()
    entry = client.commit_module("k", "task", BLOB)
    ray.kill(ray.get_actor(actor_name(storage, "run"), NAMESPACE), no_restart=True)
    assert client.modules() == (entry,)
    assert client.commit_module("k2", "next", BLOB).epoch == client.handle.epoch


def test_stop_releases_the_run_and_ends_the_actor(start, storage):
    client = start()
    pid = client.status()["pid"]
    client.stop()
    client.stop()
    assert RunStore.open(storage, "run").state.lease is None
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
    assert start().handle.epoch == 2


def test_an_abandoned_actor_ends_itself(start, storage):
    client = start(ttl_s=0.2)
    client._stopped.set()  # its driver's heartbeat stops, as when the driver is killed
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            ray.get_actor(actor_name(storage, "run"), NAMESPACE)
        except ValueError:
            break
        time.sleep(0.1)
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor(actor_name(storage, "run"), NAMESPACE)


def test_a_storage_that_the_actor_does_not_share_with_its_driver_is_said(start, tmp_path):
    elsewhere = str(tmp_path / "another node's disk")

    def open_objects(uri: str) -> Objects:
        import ray as ray_here

        from diki_ray.store.objects import LocalObjects

        class Placed(LocalObjects):
            pass

        is_actor = ray_here.get_runtime_context().get_actor_id() is not None
        objects = Placed(elsewhere if is_actor else uri)
        objects.uri = uri
        return objects

    with pytest.raises(StorageError, match="all nodes share"):
        start(objects=open_objects)
    start()  # the failed start has given the run back


def test_a_store_that_does_not_answer_is_an_error_after_the_stated_time(storage):
    from diki_ray.store.process import this_process

    nobody = StoreClient(RunHandle(storage, "run", this_process(), epoch=1), timeout_s=1.0)
    started = time.monotonic()
    with pytest.raises(StorageError, match="did not answer for 1 s"):
        nobody.modules()
    assert time.monotonic() - started < 5
