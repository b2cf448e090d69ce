"""The store's promises, without Ray: on a disk, on a bucket in memory, and over HTTP on an S3 server."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore
from storage_faults import FaultyObjects, no_sync

from diki_ray.errors import CorruptError, DiskFullError, FencedError, LeaseHeldError, StorageError, UserError
from diki_ray.runtime import objects as objects_module
from diki_ray.runtime.objects import BucketObjects, LocalObjects, Objects
from diki_ray.runtime.store import RunStore
from diki_ray.runtime.store_lease import this_process
from diki_ray.runtime.store_log import Entry, Holder, State, replay, seal, unseal

BLOB = b"prompts" * 1000


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(os, "fsync", no_sync)


@pytest.fixture(params=["disk", "bucket"])
def objects(request, tmp_path) -> Objects:
    return (
        LocalObjects(str(tmp_path / "storage"))
        if request.param == "disk"
        else BucketObjects("memory://", MemoryStore())
    )


@pytest.fixture
def disk(tmp_path) -> LocalObjects:
    return LocalObjects(str(tmp_path / "storage"))


def elsewhere() -> Holder:
    """A driver on another machine: whether it lives can't be seen from here."""
    return dataclasses.replace(this_process(), host="node-7", machine="another boot", user="alice")


def held(objects: Objects, run: str = "run", **options) -> tuple[RunStore, int]:
    store = RunStore(objects, run)
    return store, store.acquire(elsewhere(), **options)


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


class TestObjects:
    def test_put_and_get(self, objects):
        assert objects.get("a/b.json") is None
        assert objects.put("a/b.json", b"1")
        assert objects.put("a/b.json", b"2")
        assert objects.get("a/b.json") == b"2"
        assert [(i.path, i.num_bytes) for i in objects.list("a")] == [("a/b.json", 1)]
        assert objects.exists("a/b.json")
        assert not objects.exists("a")
        assert objects.folders("a") == ()
        objects.put("a/c/d", b"3")
        assert objects.folders("a") == ("c",)
        objects.delete(["a/b.json", "a/never-there.json"])
        assert objects.get("a/b.json") is None
        assert objects.list("nowhere") == ()

    def test_create_only_leaves_what_is_there(self, objects):
        assert objects.put("x", b"first", create_only=True)
        assert not objects.put("x", b"second", create_only=True)
        assert objects.get("x") == b"first"

    def test_of_many_creators_exactly_one_wins(self, objects):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i: objects.put("x", b"%d" % i, create_only=True), range(64)))
        assert sum(won) == 1
        assert objects.get("x") == b"%d" % won.index(True)

    @pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a//b", "a/./b", "", "a\\b", "a\0b"])
    def test_paths_stay_below_the_root(self, objects, path):
        with pytest.raises(UserError, match="no object name"):
            objects.put(path, b"")

    def test_a_file_is_synced_before_it_gets_its_name_and_its_folder_after(self, disk, monkeypatch):
        disk.put("a/first", b"1")
        calls = []
        for name in ("fsync", "link", "replace"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *args, real=real, name=name: (calls.append(name), real(*args))[1])
        disk.put("a/new", b"1", create_only=True)
        disk.put("a/new", b"2")
        assert calls == ["fsync", "link", "fsync", "fsync", "replace", "fsync"]

    def test_half_written_files_are_invisible_and_swept_when_old(self, disk):
        disk.put("a/b", b"1")
        half = Path(disk.uri, "a", ".c.0123.tmp")
        half.write_bytes(b"half")
        assert [info.path for info in disk.list("")] == ["a/b"]
        assert disk.sweep(older_than_s=3600) == 0
        os.utime(half, (0, 0))
        assert disk.sweep(older_than_s=3600) == 4
        assert not half.exists()

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_is_named_with_its_free_bytes_and_the_old_bytes_stay(self, disk, monkeypatch, code):
        disk.put("a", b"old")

        def full(*_):
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(DiskFullError, match=r"storage/a: no space left \([\d,]+ bytes free"):
                disk.put("a", b"new")
        assert disk.get("a") == b"old"
        assert [file.name for file in Path(disk.uri).iterdir()] == ["a"]
        disk.put("a", b"new")
        assert disk.get("a") == b"new"

    def test_other_errors_name_the_path(self, disk):
        disk.put("folder/x", b"")
        with pytest.raises(StorageError, match=r"cannot write .*folder"):
            disk.put("folder", b"")

    def test_a_file_system_without_hard_links_is_refused(self, disk, monkeypatch):
        def no_links(*_):
            raise OSError(errno.EOPNOTSUPP, "not supported")

        monkeypatch.setattr(objects_module.os, "link", no_links)
        with pytest.raises(StorageError, match="no hard links"):
            held(disk)

    def test_a_bucket_that_ignores_conditions_is_refused(self):
        class Careless(BucketObjects):
            def put(self, path, data, create_only=False):
                return super().put(path, data)

        with pytest.raises(StorageError, match="If-None-Match is ignored"):
            held(Careless("memory://", MemoryStore()))

    def test_an_unknown_scheme_is_a_user_error(self):
        with pytest.raises(UserError, match="is no storage"):
            Objects.open("ftp://somewhere/x")


class TestSeal:
    @given(
        st.dictionaries(
            st.text(max_size=5), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)
        ),
        st.data(),
    )
    @settings(max_examples=60, deadline=None)
    def test_any_changed_byte_is_noticed(self, content, data):
        sealed = seal(content)
        assert unseal(sealed, "x") == content
        place = data.draw(st.integers(0, len(sealed) - 2))  # the last byte is a newline
        flipped = bytearray(sealed)
        flipped[place] ^= data.draw(st.integers(1, 255))
        for broken in (bytes(flipped), sealed[:place]):
            with contextlib.suppress(CorruptError):
                assert unseal(broken, "x") == content  # \u00e9 may have become \u00E9: another byte, the same content


class TestLease:
    def test_a_second_driver_is_refused_with_who_holds_the_run(self, objects):
        held(objects)
        with pytest.raises(LeaseHeldError, match=r"held by alice \(pid \d+ on node-7\) since .*run.take_over=true"):
            held(objects)

    def test_acquiring_twice_is_one_lease(self, objects):
        holder, store = this_process(), RunStore(objects, "run")
        assert store.acquire(holder) == store.acquire(holder) == RunStore(objects, "run").acquire(holder) == 1
        assert store.version == 1

    def test_of_many_racers_exactly_one_wins(self, objects):
        start = threading.Barrier(8)

        def race(_):
            store = RunStore(objects, "run")
            start.wait()
            try:
                return store.acquire(elsewhere())
            except LeaseHeldError:
                return None

        with ThreadPoolExecutor(8) as pool:
            assert [epoch for epoch in pool.map(race, range(8)) if epoch] == [1]

    def test_a_released_run_is_free_at_once_and_its_old_epoch_is_dead(self, objects):
        store, epoch = held(objects)
        store.release(epoch)
        store.release(epoch)
        with pytest.raises(FencedError, match="released"):
            store.commit_module(epoch, "k", "task", BLOB)
        assert held(objects)[1] == 2

    def test_a_zombies_late_writes_are_refused(self, objects):
        zombie, old = held(objects)
        store, new = held(objects, take_over=True)
        kept = store.commit_module(new, "k", "task", BLOB)
        for write in (
            lambda: zombie.commit_module(old, "k2", "late", b"late"),
            lambda: zombie.commit_module(old, "k", "task", BLOB),
            lambda: zombie.adopt_module(old, "k", "task"),
            lambda: zombie.remove_task(old, "task"),
            lambda: zombie.roll_back(old, 1),
            lambda: zombie.compact(old),
            lambda: zombie.purge(old),
            lambda: zombie.save_checkpoint(old, "k", 1, b""),
            lambda: zombie.drop_checkpoints(old, "k"),
            lambda: zombie.put_document(old, "results.json", {}),
            lambda: zombie.renew(old),
            lambda: zombie.release(old),
        ):
            with pytest.raises(FencedError, match=r"alice .* took it over"):
                write()
        assert RunStore(objects, "run").modules() == (kept,)

    def test_a_zombie_that_checked_before_the_takeover_still_loses_the_race_for_the_number(self, objects):
        zombie, old = held(objects)
        real = zombie.log._create

        def taken_over_just_before(entry):
            zombie.log._create = real
            held(objects, take_over=True)
            return real(entry)

        zombie.log._create = taken_over_just_before
        with pytest.raises(FencedError):
            zombie.commit_module(old, "k", "late", BLOB)
        assert RunStore(objects, "run").modules() == ()

    def test_a_lost_holder_does_not_get_the_run_back_by_asking_again(self, objects):
        holder = elsewhere()
        store = RunStore(objects, "run")
        store.acquire(holder)
        held(objects, take_over=True, ttl_s=0.0)
        for ask in (store.acquire, store.resume):
            with pytest.raises(FencedError):
                ask(holder)

    def test_resuming_where_the_lease_is_unknown_says_that_the_storage_is_not_shared(self, objects):
        with pytest.raises(StorageError, match="all nodes share"):
            RunStore(objects, "run").resume(elsewhere())

    def test_a_dead_process_of_this_machine_is_followed_at_once(self, disk):
        script = (
            "import sys; from diki_ray.runtime.store import RunStore; from diki_ray.runtime.store_lease import *\n"
            "RunStore.open(sys.argv[1], 'run').acquire(this_process(), ttl_s=1000.0)"
        )
        subprocess.run([sys.executable, "-c", script, disk.uri], check=True, cwd=Path(__file__).parents[2])
        assert RunStore(disk, "run").acquire(this_process()) == 2

    def test_a_pid_that_is_used_again_is_not_taken_for_the_holder(self, disk):
        store = RunStore(disk, "run")
        store.acquire(dataclasses.replace(this_process(), started="1"), ttl_s=1000.0)
        assert store.acquire(this_process()) == 2

    def test_a_silent_driver_elsewhere_is_followed_after_its_time(self, objects):
        held(objects, ttl_s=0.3)
        with pytest.raises(LeaseHeldError, match="ends by itself in 0 s"):
            held(objects)
        started = time.monotonic()
        assert held(objects, wait_s=5.0)[1] == 2
        assert time.monotonic() - started < 1.0

    def test_a_driver_that_gives_a_sign_of_life_is_not_waited_for(self, objects):
        store, epoch = held(objects, ttl_s=30.0)
        threading.Timer(0.2, store.renew, [epoch]).start()
        started = time.monotonic()
        with pytest.raises(LeaseHeldError):
            held(objects, wait_s=20.0)
        assert time.monotonic() - started < 5.0

    def test_renewing_keeps_the_run_and_does_not_grow_the_log(self, objects):
        store, epoch = held(objects, ttl_s=0.5)
        for _ in range(4):
            time.sleep(0.2)
            store.renew(epoch)
        with pytest.raises(LeaseHeldError):
            held(objects)
        assert store.version == 1


class TestModules:
    def test_what_was_acknowledged_is_there_for_the_next_process(self, objects):
        store, epoch = held(objects)
        first = store.commit_module(epoch, "k1", "aircraft", BLOB, {"num_classes": 100, "shape": (2, 3)})
        second = store.commit_module(epoch, "k2", "birds", b"other")
        assert RunStore(objects, "run").modules() == (first, second)
        assert store.read_module(first.digest) == BLOB
        assert (first.task, first.key, first.num_bytes, first.epoch) == ("aircraft", "k1", len(BLOB), epoch)
        assert first.metadata == {"num_classes": 100, "shape": [2, 3]}

    def test_the_same_key_twice_is_one_entry(self, objects):
        store, epoch = held(objects)
        entry = store.commit_module(epoch, "k", "task", BLOB)
        assert store.commit_module(epoch, "k", "task", BLOB) == entry
        assert store.commit_module(epoch, "k", "task", b"rounded differently") == entry
        assert RunStore(objects, "run").commit_module(epoch, "k", "task", BLOB) == entry
        assert store.modules() == (entry,)

    def test_between_runs_the_first_writer_of_a_key_wins(self, objects):
        first, epoch = held(objects, "one")
        entry = first.commit_module(epoch, "k", "task", BLOB, {"by": "one"})
        second, epoch = held(objects, "two")
        assert second.commit_module(epoch, "k", "task", b"other bytes", {"by": "two"}).digest == entry.digest
        assert second.modules()[0].metadata == {"by": "one"}

    def test_a_module_of_another_run_is_adopted_without_training(self, objects):
        one, epoch = held(objects, "one")
        entry = one.commit_module(epoch, "k", "task", BLOB)
        two, epoch = held(objects, "two")
        assert two.adopt_module(epoch, "unknown", "task") is None
        assert two.find_in_library("k") == entry.digest
        adopted = two.adopt_module(epoch, "k", "its own name for it")
        assert adopted == two.adopt_module(epoch, "k", "its own name for it")
        assert adopted is not None
        assert (adopted.digest, adopted.task) == (entry.digest, "its own name for it")
        assert two.module_by_key("k") == BLOB
        assert two.has_module("k")

    def test_a_task_under_another_key_is_replaced_in_its_place(self, objects):
        store, epoch = held(objects)
        for task in ("a", "b", "c"):
            store.commit_module(epoch, f"{task}1", task, task.encode())
        store.commit_module(epoch, "b2", "b", b"better")
        assert [(entry.task, entry.key) for entry in store.modules()] == [("a", "a1"), ("b", "b2"), ("c", "c1")]

    def test_a_commit_whose_answer_was_lost_is_one_entry(self, disk):
        store, epoch = held(disk)
        for at in range(1, 4):  # the blob, the key, the log entry
            faulty = RunStore(FaultyObjects(disk, at, "lost-answer"), "run")
            with pytest.raises(StorageError, match="connection reset"):
                faulty.commit_module(epoch, f"k{at}", f"task {at}", b"%d" % at)
            entry = faulty.commit_module(epoch, f"k{at}", f"task {at}", b"%d" % at)
            store.refresh()
            assert store.modules()[-1] == entry
        assert len(store.modules()) == 3

    def test_a_full_disk_leaves_the_last_good_state_and_works_again(self, disk):
        store, epoch = held(disk)
        good = (store.commit_module(epoch, "k", "a", b"a"),)
        for at in range(1, 4):
            faulty = RunStore(FaultyObjects(disk, at, "full"), "run")
            with pytest.raises(DiskFullError):
                faulty.commit_module(epoch, f"k{at}", f"task {at}", b"%d" % at)
            assert RunStore(disk, "run").modules() == good
            good = (*good, faulty.commit_module(epoch, f"k{at}", f"task {at}", b"%d" % at))
            assert RunStore(disk, "run").modules() == good

    @pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "missing"])
    def test_a_damaged_module_is_found_counted_and_put_right_by_training_again(self, disk, how):
        store, epoch = held(disk)
        entry = store.commit_module(epoch, "k", "task", BLOB)
        file = Path(disk.uri, "library", "modules", f"{entry.digest}.safetensors")
        if how == "flipped":
            damage(file)
        elif how == "missing":
            file.unlink()
        else:
            file.write_bytes(BLOB[: len(BLOB) // 2] if how == "truncated" else b"")
        with pytest.raises(StorageError, match=f"{entry.digest}.*run the job again") as caught:
            store.read_module(entry.digest)
        assert isinstance(caught.value, CorruptError) == (how != "missing")
        assert not store.has_module("k")
        assert store.damaged_modules() == (entry,)
        assert store.adopt_module(epoch, "k", "task") is None
        assert (store.corrupt_modules > 0) == (how != "missing")
        again = store.commit_module(epoch, "k", "task", BLOB)
        assert again == entry
        assert store.read_module(entry.digest) == BLOB
        assert store.verify() == ()

    def test_a_damaged_module_trained_to_other_bytes_is_replaced(self, disk):
        store, epoch = held(disk)
        entry = store.commit_module(epoch, "k", "task", BLOB)
        damage(Path(disk.uri, "library", "modules", f"{entry.digest}.safetensors"))
        other = store.commit_module(epoch, "k", "task", b"other rounding")
        assert store.read_module(other.digest) == b"other rounding"
        assert store.find_in_library("k") == other.digest
        assert RunStore(disk, "run").modules() == (other,)

    @pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "x" * 201, "a b"])
    def test_names_that_can_not_be_files_are_refused(self, disk, name):
        store, epoch = held(disk)
        with pytest.raises(UserError, match="module key"):
            store.commit_module(epoch, name, "task", BLOB)
        with pytest.raises(UserError, match="run name"):
            RunStore(disk, name)


class TestChangingMinds:
    def test_a_removed_task_is_as_if_it_had_never_been_there(self, objects):
        store, epoch = held(objects)
        for task in ("a", "b", "c"):
            store.commit_module(epoch, f"k-{task}", task, task.encode())
        removal = store.remove_task(epoch, "b")
        assert store.remove_task(epoch, "b") == removal
        assert [entry.task for entry in RunStore(objects, "run").modules()] == ["a", "c"]
        with pytest.raises(UserError, match=r"no task 'd'; it has: a, c"):
            store.remove_task(epoch, "d")
        assert [e.task for e in (store.commit_module(epoch, "k-b", "b", b"b"), *store.modules())] == [
            "b",
            "a",
            "c",
            "b",
        ]

    def test_rolling_back_is_an_entry_and_can_be_rolled_back(self, objects):
        store, epoch = held(objects)
        first = store.commit_module(epoch, "k1", "a", b"a")
        store.commit_module(epoch, "k2", "b", b"b")
        full = store.modules()
        before = store.version
        assert store.roll_back(epoch, first.seq) == (first,)
        assert store.roll_back(epoch, first.seq) == (first,)
        assert store.version == before + 1
        assert RunStore(objects, "run").modules() == (first,)
        assert store.roll_back(epoch, before) == full == RunStore(objects, "run").modules()
        with pytest.raises(UserError, match="entries 1 to"):
            store.roll_back(epoch, 99)

    def test_rolling_back_does_not_bring_an_old_lease_back(self, objects):
        store, _ = held(objects)
        _, new = held(objects, take_over=True)
        store.roll_back(new, 1)
        with pytest.raises(FencedError):
            store.commit_module(1, "k", "task", BLOB)

    def test_purge_deletes_what_no_run_refers_to_and_says_so(self, objects):
        one, epoch = held(objects, "one")
        two, epoch_two = held(objects, "two")
        shared = one.commit_module(epoch, "shared", "a", b"shared")
        two.adopt_module(epoch_two, "shared", "a")
        gone = one.commit_module(epoch, "gone", "b", b"gone" * 10)
        two.release(epoch_two)
        for task in ("a", "b"):
            one.remove_task(epoch, task)
        dry = one.purge(epoch, dry_run=True)
        assert one.read_module(gone.digest) == b"gone" * 10
        report = one.purge(epoch)
        assert (report.digests, report.num_bytes, report.num_keys) == ((gone.digest,), 40, 1)
        assert (dry.digests, dry.num_bytes) == (report.digests, report.num_bytes)
        assert one.find_in_library("gone") is None
        assert one.read_module(shared.digest) == b"shared"
        assert RunStore(objects, "two").verify() == ()
        assert one.purge(epoch).digests == ()
        with pytest.raises(UserError, match="modules of b were purged"):
            one.roll_back(epoch, gone.seq)

    def test_purge_waits_for_no_driver_that_may_be_about_to_refer_to_a_blob(self, objects):
        one, epoch = held(objects, "one")
        two, _ = held(objects, "two")
        with pytest.raises(LeaseHeldError, match="run 'two' of this storage is held"):
            one.purge(epoch)
        two.release(1)
        one.purge(epoch)

    def test_a_sleeping_driver_can_not_wake_up_and_refer_to_what_was_purged(self, objects):
        one, epoch = held(objects, "one")
        one.commit_module(epoch, "k", "a", BLOB)
        sleeper, old = held(objects, "two", ttl_s=0.0)
        one.remove_task(epoch, "a")
        assert len(one.purge(epoch).digests) == 1
        with pytest.raises(FencedError):
            sleeper.adopt_module(old, "k", "a")

    def test_no_run_starts_while_a_storage_is_purged(self, objects, monkeypatch):
        one, epoch = held(objects, "one")
        refused = []

        def during(*args):
            with pytest.raises(LeaseHeldError, match="tidying"):
                held(objects, "two")
            refused.append(True)
            return {}, []

        with monkeypatch.context() as patch:
            patch.setattr("diki_ray.runtime.store_upkeep._unreferenced", during)
            one.purge(epoch)
        assert refused == [True]
        held(objects, "two")

    def test_purge_does_nothing_on_incomplete_knowledge(self, disk):
        one, epoch = held(disk, "one")
        one.commit_module(epoch, "k", "a", BLOB)
        one.remove_task(epoch, "a")
        held(disk, "two", ttl_s=0.0)
        damage(Path(disk.uri, "runs/two/log/00000001.json"))
        with pytest.raises(CorruptError, match="run 'two' is not opened"):
            one.purge(epoch)
        assert one.find_in_library("k")


class TestLog:
    def test_compacting_loses_nothing_and_opening_reads_little(self, disk):
        store, epoch = held(disk)
        for i in range(40):
            store.commit_module(epoch, f"k{i}", f"task {i}", b"%d" % i)
        store.remove_task(epoch, "task 3")
        state = store.state
        assert store.compact(epoch) == store.version
        later = store.commit_module(epoch, "k", "later", BLOB)

        class Counting(FaultyObjects):
            num_gets = 0

            def get(self, path):
                self.num_gets += 1
                return super().get(path)

        counting = Counting(disk, 0, "")
        opened = RunStore(counting, "run")
        assert opened.modules() == (*state.modules, later)
        assert opened.state == store.state
        assert counting.num_gets <= 4
        assert store.roll_back(epoch, 5) == store.log.state_at(5).modules  # history is still there

    @pytest.mark.parametrize("bad", ["newest", "all"])
    def test_a_damaged_snapshot_is_no_loss(self, disk, bad):
        store, epoch = held(disk)
        for i in range(3):
            store.commit_module(epoch, f"k{i}", f"task {i}", b"%d" % i)
            store.compact(epoch)
        snapshots = sorted(Path(disk.uri, "runs/run/snapshots").iterdir())
        assert len(snapshots) == 2
        for file in snapshots if bad == "all" else snapshots[-1:]:
            damage(file)
        opened = RunStore(disk, "run")
        assert opened.state == store.state
        assert any("snapshot" in problem.what for problem in opened.verify())

    @pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "swapped"])
    def test_a_damaged_log_entry_is_never_passed_over_in_silence(self, disk, how):
        store, epoch = held(disk)
        for i in range(3):
            store.commit_module(epoch, f"k{i}", f"task {i}", b"%d" % i)
        log = Path(disk.uri, "runs/run/log")
        file = log / "00000003.json"
        if how == "flipped":
            damage(file)
        elif how == "truncated":
            file.write_bytes(file.read_bytes()[:-20])
        elif how == "missing":
            file.unlink()
        else:
            file.write_bytes((log / "00000002.json").read_bytes())
        with pytest.raises(CorruptError, match=r"log/00000003.json .* put that file back .* compact --accept-loss"):
            RunStore(disk, "run")
        salvaged = RunStore(disk, "run", salvage=True)
        assert [entry.task for entry in salvaged.modules()] == ["task 0", "task 2"]
        assert any("00000003" in problem.path for problem in salvaged.verify())
        salvaged.compact(epoch)
        reopened = RunStore(disk, "run")
        assert [entry.task for entry in reopened.modules()] == ["task 0", "task 2"]
        reopened.commit_module(epoch, "k1", "task 1", b"1")
        assert len(RunStore(disk, "run").modules()) == 3

    def test_an_entry_of_a_newer_format_is_not_guessed_at(self, disk):
        store, _ = held(disk)
        disk.put(store.log.path(2), seal({"format": 99, "seq": 2}))
        with pytest.raises(StorageError, match="format 99"):
            RunStore(disk, "run")

    def test_an_entry_of_an_overtaken_epoch_has_no_effect(self):
        lease = {"holder": vars(elsewhere()), "ttl_s": 1.0}
        entries = [
            Entry(1, "lease", 1, 0.0, metadata=lease),
            Entry(2, "lease", 2, 0.0, metadata=lease),
            Entry(3, "module", 1, 0.0, task="late", key="k", digest="d"),
            Entry(4, "release", 2, 0.0),
            Entry(5, "module", 2, 0.0, task="after its end", key="k", digest="d"),
        ]
        state = replay(entries)
        assert (state.seq, state.epoch, state.modules, state.lease) == (5, 2, (), None)


class TestCheckpoints:
    @pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "description flipped", "description missing"])
    def test_a_damaged_checkpoint_is_counted_and_the_one_before_is_used(self, disk, how):
        store, epoch = held(disk)
        assert store.load_checkpoint("k") is None
        for step in (10, 20):
            store.save_checkpoint(epoch, "k", step, b"state %d" % step * 50, {"step": step})
        assert store.load_checkpoint("k") == (20, b"state 20" * 50, {"step": 20})
        folder = Path(disk.uri, "runs/run/checkpoints/k")
        file = next(folder.glob("00000020.json" if "description" in how else "00000020-*"))
        if "missing" in how:
            file.unlink()
        elif how == "truncated":
            file.write_bytes(file.read_bytes()[:100])
        else:
            damage(file)
        assert store.load_checkpoint("k") == (10, b"state 10" * 50, {"step": 10})
        # Without its description, written last, a checkpoint never was: that is no damage.
        assert store.corrupt_checkpoints == (0 if how == "description missing" else 1)
        store.save_checkpoint(epoch, "k", 20, b"again")
        assert store.load_checkpoint("k") == (20, b"again", {})

    def test_the_last_two_are_kept_and_a_committed_task_drops_them(self, objects):
        store, epoch = held(objects)
        for step in (10, 20, 30, 30):
            store.save_checkpoint(epoch, "k", step, b"state of %d at %f" % (step, time.time()))
        names = [info.path.rpartition("/")[2] for info in objects.list("runs/run/checkpoints")]
        assert [name[:8] for name in names] == ["00000020"] * 2 + ["00000030"] * 2
        store.drop_checkpoints(epoch, "k")
        assert store.load_checkpoint("k") is None
        assert objects.list("runs/run/checkpoints") == ()

    def test_nothing_but_damaged_checkpoints_means_from_the_start(self, disk):
        store, epoch = held(disk)
        for step in (10, 20):
            store.save_checkpoint(epoch, "k", step, b"state")
        for file in Path(disk.uri, "runs/run/checkpoints/k").iterdir():
            file.write_bytes(b"")
        assert store.load_checkpoint("k") is None
        assert store.corrupt_checkpoints == 2
        assert len(store.verify()) == 2


class TestDocumentsAndCache:
    def test_documents(self, objects):
        store, epoch = held(objects)
        assert store.get_document("results.json") is None
        store.put_document(epoch, "results.json", {"average": 0.5})
        store.put_document(epoch, "report/table.md", "| a |")
        assert store.get_document("results.json") == {"average": 0.5}
        assert store.get_document("report/table.md") == "| a |"
        with pytest.raises(UserError, match="no object name"):
            store.get_document("../../library/keys/k.json")

    def test_a_damaged_cache_is_no_cache(self, disk):
        store, _ = held(disk)
        assert store.cache_get("features-abc") is None
        store.cache_put("features-abc", BLOB)
        assert store.cache_get("features-abc") == BLOB
        damage(Path(disk.uri, "runs/run/cache/features-abc"))
        assert store.cache_get("features-abc") is None

    def test_a_damaged_document_is_said(self, disk):
        store, epoch = held(disk)
        store.put_document(epoch, "results.json", {"average": 0.5})
        Path(disk.uri, "runs/run/results/results.json").write_bytes(b'{"average": 0.')
        with pytest.raises(CorruptError, match=r"results\.json is damaged"):
            store.get_document("results.json")
        assert [problem.path for problem in store.verify()] == ["runs/run/results/results.json"]


class TestMoving:
    def filled(self, objects: Objects) -> RunStore:
        store, epoch = held(objects)
        for task in ("a", "b", "removed"):
            store.commit_module(epoch, f"k-{task}", task, task.encode() * 100, {"num_classes": 3})
        store.remove_task(epoch, "removed")
        store.save_checkpoint(epoch, "k-c", 10, b"in training")
        store.put_document(epoch, "results.json", {"average": 0.5})
        store.cache_put("features", BLOB)
        store.compact(epoch)
        store.release(epoch)
        return store

    @pytest.mark.parametrize("name", ["copy", "copy.tar"])
    def test_an_exported_run_opens_elsewhere_as_it_was(self, objects, tmp_path, name):
        store, path = self.filled(objects), str(tmp_path / "out" / name)
        assert store.export(path) > 0
        if name == "copy":
            assert RunStore.open(path, "run").state == store.state
        moved = RunStore.import_(str(tmp_path / "new"), "run", path)
        assert moved.state == store.state
        assert moved.verify() == ()
        assert moved.load_checkpoint("k-c") == (10, b"in training", {})
        assert moved.get_document("results.json") == {"average": 0.5}
        assert moved.cache_get("features") is None
        assert RunStore.import_(str(tmp_path / "new"), "run", path).state == store.state
        epoch = moved.acquire(elsewhere())
        assert moved.commit_module(epoch, "k-c", "c", b"c").seq == store.version + 2
        with pytest.raises(UserError, match="already, held or further on"):
            RunStore.import_(str(tmp_path / "new"), "run", path)

    def test_an_import_under_another_name_or_into_anothers_run(self, disk, tmp_path):
        store, path = self.filled(disk), str(tmp_path / "copy")
        store.export(path)
        assert RunStore.import_(disk.uri, "second", path).modules() == store.modules()
        other, epoch = held(disk, "other")
        other.release(epoch)
        with pytest.raises(UserError, match="another run of that name"):
            RunStore.import_(disk.uri, "other", path)
        with pytest.raises(UserError, match="no run 'x'; it has: other, run, second"):
            RunStore.import_(str(tmp_path / "new"), "x", disk.uri)

    def test_an_export_refuses_a_damaged_module_and_leaves_no_half_tar(self, disk, tmp_path):
        store = self.filled(disk)
        damage(Path(disk.uri, "library/modules", f"{store.modules()[0].digest}.safetensors"))
        with pytest.raises(CorruptError):
            store.export(str(tmp_path / "out" / "copy.tar"))
        assert list((tmp_path / "out").iterdir()) == []

    @pytest.mark.parametrize("evil", ["../escaped", "/tmp/escaped", "link", "device"])
    def test_a_malicious_tar_writes_nothing_outside(self, tmp_path, evil):
        archive = tmp_path / "evil.tar"
        with tarfile.open(archive, "w") as tar:
            member = tarfile.TarInfo(evil)
            if evil == "link":
                member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            elif evil == "device":
                member.type = tarfile.CHRTYPE
            tar.addfile(member, io.BytesIO(b""))
        with pytest.raises(UserError, match=r"no object name|no regular file"):
            RunStore.import_(str(tmp_path / "storage"), "run", str(archive))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.tar"]

    def test_a_file_that_is_no_tar_is_a_user_error(self, tmp_path):
        (tmp_path / "x.tar").write_bytes(b"no tar")
        with pytest.raises(UserError, match=r"x\.tar can't be read"):
            RunStore.import_(str(tmp_path / "storage"), "run", str(tmp_path / "x.tar"))


class Model:
    """What a run is, in the fewest words: the tasks and, for each number of the log, what they were."""

    def __init__(self) -> None:
        self.tasks: dict[str, str] = {}
        self.history: dict[int, dict[str, str]] = {}


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["commit", "commit", "remove", "roll_back", "compact", "reopen", "take_over"]),
        st.integers(0, 4),
    ),
    max_size=25,
)


@given(OPERATIONS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_sequence_of_operations_agrees_with_a_plain_dictionary(operations):
    objects, model = BucketObjects("memory://", MemoryStore()), Model()
    store, epoch = held(objects)
    for number, (operation, choice) in enumerate(operations):
        task = f"task{choice}"
        if operation == "commit":
            store.commit_module(epoch, f"k{number}", task, b"%d" % number)
            model.tasks = {**model.tasks, task: f"k{number}"}
        elif operation == "remove" and task in model.tasks:
            store.remove_task(epoch, task)
            model.tasks = {name: key for name, key in model.tasks.items() if name != task}
        elif operation == "roll_back" and model.history:
            seq = sorted(model.history)[choice % len(model.history)]
            store.roll_back(epoch, seq)
            model.tasks = model.history[seq]
        elif operation == "compact":
            store.compact(epoch)
        elif operation == "reopen":
            store = RunStore(objects, "run")
        elif operation == "take_over":
            store, epoch = held(objects, take_over=True)
        model.history[store.version] = model.tasks
        assert {entry.task: entry.key for entry in store.modules()} == model.tasks
    assert RunStore(objects, "run").state == store.state
    assert list(model.tasks) == [entry.task for entry in store.modules()]
    assert store.verify() == ()


class TestS3:
    """The same promises over HTTP, with S3's conditional puts."""

    @pytest.fixture(scope="class")
    def server(self):
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        yield "http://{}:{}".format(*server.get_host_and_port())
        server.stop()

    @pytest.fixture
    def storage(self, server, monkeypatch, request) -> str:
        import boto3

        for name, value in {
            "AWS_ENDPOINT_URL": server,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        bucket = f"bucket-{abs(hash(request.node.name)) % 10**8}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        return f"s3://{bucket}/some/prefix"

    def test_a_runs_whole_life(self, storage, tmp_path):
        store = RunStore.open(storage, "run")
        epoch = store.acquire(elsewhere())
        entry = store.commit_module(epoch, "k", "task", BLOB * 300, {"num_classes": 3})
        store.save_checkpoint(epoch, "k2", 10, BLOB)
        store.put_document(epoch, "results.json", {"average": 0.5})
        again = RunStore.open(storage, "run")
        assert again.modules() == (entry,)
        assert again.read_module(entry.digest) == BLOB * 300
        assert again.load_checkpoint("k2") == (10, BLOB, {})
        assert RunStore.runs(storage) == ("run",)
        with pytest.raises(LeaseHeldError):
            again.acquire(elsewhere())
        new = again.acquire(elsewhere(), take_over=True)
        with pytest.raises(FencedError):
            store.commit_module(epoch, "late", "late", b"late")
        again.remove_task(new, "task")
        again.compact(new)
        assert again.purge(new).digests == (entry.digest,)
        assert again.verify() == ()
        again.export(str(tmp_path / "copy.tar"))
        assert RunStore.import_(str(tmp_path / "disk"), "run", str(tmp_path / "copy.tar")).state == again.state

    def test_create_only_leaves_what_is_there(self, storage):
        objects = Objects.open(storage)
        assert objects.put("x", b"first", create_only=True)
        assert not objects.put("x", b"second", create_only=True)
        assert objects.get("x") == b"first"
        assert objects.get("y") is None

    def test_a_missing_bucket_is_said(self, storage):
        with pytest.raises(StorageError, match="no-such-bucket"):
            held(Objects.open("s3://no-such-bucket/x"))


class TestCommand:
    def call(self, capsys, *arguments: str) -> tuple[int, str, str]:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        from jobs import store as command

        code = command.main(list(arguments))
        return code, *capsys.readouterr()

    def test_list_verify_remove_rollback_purge_compact(self, disk, tmp_path, capsys):
        store, epoch = held(disk)
        store.commit_module(epoch, "k1", "aircraft", BLOB)
        store.commit_module(epoch, "k2", "birds", b"birds")
        code, _, message = self.call(capsys, "remove", disk.uri, "run", "birds")
        assert code == 2
        assert "held by alice" in message
        assert "--take-over" in message
        store.release(epoch)
        assert "birds" in self.call(capsys, "list", disk.uri, "run")[1]
        assert json.loads(self.call(capsys, "list", disk.uri, "--json")[1])["runs"][0]["tasks"] == 2
        undo = json.loads(self.call(capsys, "remove", disk.uri, "run", "birds", "--json")[1])["undo_with"]
        assert "lease" in self.call(capsys, "list", disk.uri, "run", "--history")[1]
        assert self.call(capsys, "rollback", disk.uri, "run", str(undo))[0] == 0
        assert len(RunStore(disk, "run").modules()) == 2
        code, text, _ = self.call(capsys, "remove", disk.uri, "run", "birds")
        assert f"jobs/store.py purge {disk.uri} run" in text
        assert "1 modules, 5 bytes would be" in self.call(capsys, "purge", disk.uri, "run", "--dry-run")[1]
        assert json.loads(self.call(capsys, "purge", disk.uri, "run", "--json")[1])["num_bytes"] == 5
        assert self.call(capsys, "compact", disk.uri, "run")[0] == 0
        assert self.call(capsys, "verify", disk.uri, "run")[0] == 0
        assert self.call(capsys, "export", disk.uri, "run", str(tmp_path / "x.tar"))[0] == 0
        assert self.call(capsys, "import", str(tmp_path / "new"), "run", str(tmp_path / "x.tar"))[0] == 0

    def test_damage_is_exit_code_1_and_a_mistake_2_with_one_sentence(self, disk, capsys):
        store, epoch = held(disk)
        store.commit_module(epoch, "k", "task", BLOB)
        store.commit_module(epoch, "k2", "task2", BLOB)
        store.release(epoch)
        damage(Path(disk.uri, store.log.path(2)))
        code, text, _ = self.call(capsys, "verify", disk.uri, "run")
        assert code == 1
        assert "00000002.json" in text
        code, _, message = self.call(capsys, "list", disk.uri, "run")
        assert code == 2
        assert "--accept-loss" in message
        assert self.call(capsys, "compact", disk.uri, "run", "--accept-loss")[0] == 0
        assert self.call(capsys, "list", disk.uri, "run")[0] == 0
        code, _, message = self.call(capsys, "list", disk.uri, "nope")
        assert code == 2
        assert message == f"error: {disk.uri} has no run 'nope'; it has: run\n"


def test_state_survives_its_own_encoding():
    assert State() == replay([])
