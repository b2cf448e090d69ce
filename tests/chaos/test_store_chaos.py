"""Kill the store at every change it makes to storage, in every way, and look at what is left.

A driver's life is a list of operations. Its process is ended (or its storage fails) at change number n, for every n.
After each: the run opens, what was acknowledged is there, the operation in flight is there whole or not at all, nothing
is damaged; and carrying on from there ends in exactly the state of an undisturbed life.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from storage_faults import KILLED, FaultyObjects, no_sync  # noqa: E402

from diki_ray.errors import FencedError, StorageError  # noqa: E402
from diki_ray.store.objects import LocalObjects, Objects  # noqa: E402
from diki_ray.store.process import this_process  # noqa: E402
from diki_ray.store.run_log import UPKEEP_LOCK  # noqa: E402
from diki_ray.store.run_store import RunStore  # noqa: E402

Operation = Callable[[RunStore, int], Any]
BLOB = b"prompts" * 300

LIFE: list[Operation] = [
    lambda store, epoch: store.commit_module(epoch, "k-a", "a", b"a" + BLOB),
    lambda store, epoch: store.save_checkpoint(epoch, "k-b", 10, b"10" + BLOB),
    lambda store, epoch: store.save_checkpoint(epoch, "k-b", 20, b"20" + BLOB),
    lambda store, epoch: store.save_checkpoint(epoch, "k-b", 30, b"30" + BLOB),
    lambda store, epoch: store.commit_module(epoch, "k-b", "b", b"b" + BLOB, {"num_classes": 3}),
    lambda store, epoch: store.drop_checkpoints(epoch, "k-b"),
    lambda store, epoch: store.put_document(epoch, "results.json", {"after": "b"}),
    lambda store, epoch: store.compact(epoch),
    lambda store, epoch: store.adopt_module(epoch, "k-a", "a again"),
    lambda store, epoch: store.commit_module(epoch, "k-b2", "b", b"b2" + BLOB),
    lambda store, epoch: store.remove_task(epoch, "a again"),
    lambda store, epoch: store.purge(epoch),
    lambda store, epoch: store.roll_back(epoch, store.modules()[0].seq),
    lambda store, epoch: store.compact(epoch),
    lambda store, epoch: store.purge(epoch),
    lambda store, epoch: store.put_document(epoch, "results.json", {"after": "all"}),
]


def live(objects: Objects, first: int, acknowledge: Callable[[int], None]) -> None:
    """A driver's life from operation `first` on: what a command that is started again does."""
    store = RunStore(objects, "run")
    epoch = store.acquire(this_process())
    for number, operation in enumerate(LIFE[first:], first):
        operation(store, epoch)
        acknowledge(number + 1)
    store.release(epoch)


def view(objects: Objects) -> dict[str, Any]:
    """Everything a user can see of the run."""
    store = RunStore(objects, "run")
    return {
        "modules": [(e.task, e.key, store.read_module(e.digest), e.metadata) for e in store.modules()],
        "checkpoint": store.load_checkpoint("k-b"),
        "document": store.get_document("results.json"),
    }


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(os, "fsync", no_sync)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[dict[str, Any]]:
    """The view after each number of acknowledged operations."""
    objects = LocalObjects(str(tmp_path_factory.mktemp("undisturbed")))
    views = [view(objects)]
    live(objects, 0, lambda number: views.append(view(objects)))
    assert len(views) == len(LIFE) + 1
    assert [task for task, *_ in views[-1]["modules"]] == ["a"]
    return views


def check_what_is_left(objects: Objects, num_acknowledged: int, undisturbed: list[dict[str, Any]]) -> None:
    assert view(objects) in undisturbed[num_acknowledged : num_acknowledged + 2]
    store = RunStore(objects, "run")
    assert store.verify() == ()
    for info in objects.list("library/keys"):
        assert store.find_in_library(Path(info.path).stem), "a key leads to a blob that is not there"
    live(objects, num_acknowledged, lambda number: None)
    assert view(objects) == undisturbed[-1]
    assert RunStore(objects, "run").verify() == ()


@pytest.mark.parametrize("way", ["kill-before", "kill-torn", "kill-after"])
def test_a_process_killed_at_any_change_loses_nothing_it_acknowledged(way, tmp_path, undisturbed):
    subprocess.run([sys.executable, __file__, "sweep", way, str(tmp_path)], check=True, timeout=120)
    lives = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    assert len(lives) > 2 * len(LIFE)  # one for each change, and the last one that no fault met
    for folder in lives:
        check_what_is_left(LocalObjects(str(folder / "storage")), acknowledged(folder), undisturbed)
    assert acknowledged(lives[-1]) == len(LIFE)


@pytest.mark.parametrize("way", ["full", "io-error", "lost-answer"])
def test_storage_that_fails_at_any_change_is_an_error_and_the_next_try_works(way, tmp_path, undisturbed):
    num_faults = 0
    for at in range(1, 1000):
        objects = LocalObjects(str(tmp_path / str(at)))
        faulty = FaultyObjects(objects, at, way)
        done = [0]
        try:
            live(faulty, 0, lambda number, done=done: done.append(number))
        except StorageError:
            num_faults += 1
            assert view(objects) in undisturbed[done[-1] : done[-1] + 2]
            if faulty.failed_path == UPKEEP_LOCK:
                objects.delete([UPKEEP_LOCK])  # in life: wait for the minute after which it counts for nothing
            # The driver gives up with that error; its process may live on, so its lease is simply taken over.
            store = RunStore(objects, "run")
            store.release(store.acquire(this_process(), take_over=True))
            check_what_is_left(objects, done[-1], undisturbed)
        if faulty.num_changes < at:
            break
    assert num_faults > 2 * len(LIFE)


@pytest.mark.parametrize("way", ["full", "lost-answer"])
def test_a_driver_that_lives_on_after_an_error_repeats_the_operation(way, tmp_path, undisturbed):
    """What the actor's client does: the same process, the same epoch, the same call again."""
    for at in range(3, 1000):  # changes 1 and 2 take the lease
        objects = LocalObjects(str(tmp_path / str(at)))
        faulty = FaultyObjects(objects, at, way)
        store = RunStore(faulty, "run")
        epoch = store.acquire(this_process())
        for number, operation in enumerate(LIFE):
            try:
                operation(store, epoch)
            except StorageError:
                operation(store, epoch)
            assert view(objects) == undisturbed[number + 1], (at, number)
        if faulty.num_changes < at:
            break


def test_a_process_killed_at_any_moment_loses_nothing_it_acknowledged(tmp_path):
    """SIGKILL from outside, at moments that no list of changes foresees."""
    moments = random.Random(0)
    for attempt in range(12):
        folder = tmp_path / str(attempt % 3)  # several lives of the same run
        folder.mkdir(exist_ok=True)
        child = subprocess.Popen([sys.executable, __file__, "commit-on-and-on", str(folder)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"started\n"
        time.sleep(moments.uniform(0.0, 0.15))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        store = RunStore.open(str(folder / "storage"), "run")
        tasks = [entry.task for entry in store.modules()]
        assert tasks == [f"task-{number}" for number in range(len(tasks))]
        assert acknowledged(folder) <= len(tasks) <= acknowledged(folder) + 1
        assert store.verify() == ()


def test_drivers_that_take_the_run_from_each_other_lose_no_acknowledged_module(tmp_path):
    """Four processes fight for one run; each commits until it is fenced, then takes over again."""
    children = [
        subprocess.Popen([sys.executable, __file__, "fight", str(tmp_path), name], stdout=subprocess.PIPE, text=True)
        for name in "abcd"
    ]
    reports = [json.loads(child.communicate(timeout=120)[0]) for child in children]
    store = RunStore.open(str(tmp_path / "storage"), "run")
    there = {entry.task: entry.epoch for entry in store.modules()}
    committed = {task: epoch for report in reports for task, epoch in report["committed"].items()}
    assert committed.items() <= there.items()
    assert not there.keys() & {task for report in reports for task in report["refused"]}
    assert sum(len(report["refused"]) for report in reports) > 0
    epochs = [entry.epoch for entry in sorted(store.modules(), key=lambda entry: entry.seq)]
    assert epochs == sorted(epochs)
    assert store.verify() == ()


def acknowledged(folder: Path) -> int:
    file = folder / "acknowledged"
    return max([int(line) for line in file.read_text().split()], default=0) if file.exists() else 0


def _say(folder: Path, number: int) -> None:
    with open(folder / "acknowledged", "a") as file:
        file.write(f"{number}\n")


def _sweep(way: str, root: Path) -> None:
    """One life for each number of change, each in a forked process: an interpreter takes longer to start."""
    os.fsync = no_sync
    for at in range(1, 1000):
        folder = root / str(at)
        folder.mkdir()
        if (child := os.fork()) == 0:
            try:
                objects = FaultyObjects(LocalObjects(str(folder / "storage")), at, way)
                live(objects, 0, lambda number, folder=folder: _say(folder, number))
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED), code
        if code == 0:
            return


def _commit_on_and_on(folder: Path) -> None:
    store = RunStore.open(str(folder / "storage"), "run")
    epoch = store.acquire(this_process())
    print("started", flush=True)
    for number in range(len(store.modules()), 1_000_000):
        store.commit_module(epoch, f"k-{number}", f"task-{number}", b"%d" % number + BLOB)
        _say(folder, number + 1)


def _fight(folder: Path, name: str) -> None:
    store, committed, refused, number = RunStore.open(str(folder / "storage"), "run"), {}, [], 0
    for _ in range(8):
        epoch = store.acquire(this_process(), take_over=True)
        for _ in range(8):
            number += 1
            task = f"{name}-{number}"
            try:
                committed[task] = store.commit_module(epoch, f"k-{task}", task, task.encode()).epoch
            except FencedError:
                refused.append(task)
                break
            time.sleep(0.01)
    print(json.dumps({"committed": committed, "refused": refused}))


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "sweep":
        _sweep(arguments[0], Path(arguments[1]))
    elif command == "commit-on-and-on":
        _commit_on_and_on(Path(arguments[0]))
    elif command == "fight":
        _fight(Path(arguments[0]), arguments[1])
