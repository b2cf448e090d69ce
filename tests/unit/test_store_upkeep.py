"""Removing, rolling back, purging, moving a run, and the command that does it."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from storage_faults import BLOB, damage, elsewhere, held

from diki_ray.errors import CorruptError, FencedError, LeaseHeldError, UserError
from diki_ray.store.caches import Cache
from diki_ray.store.objects import Objects
from diki_ray.store.run_store import RunStore

pytest_plugins = ["storage_fixtures"]
pytestmark = pytest.mark.usefixtures("fast")


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
            patch.setattr("diki_ray.store.upkeep._unreferenced", during)
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


class TestMoving:
    def filled(self, objects: Objects) -> RunStore:
        store, epoch = held(objects)
        for task in ("a", "b", "removed"):
            store.commit_module(epoch, f"k-{task}", task, task.encode() * 100, {"num_classes": 3})
        store.remove_task(epoch, "removed")
        store.save_checkpoint(epoch, "k-c", 10, b"in training")
        store.put_document(epoch, "results.json", {"average": 0.5})
        Cache(objects).put("features", BLOB)
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
        assert Cache(moved.objects).get("features") is None
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


class TestCommand:
    def test_list_verify_remove_rollback_purge_compact(self, disk, tmp_path, job):
        store, epoch = held(disk)
        store.commit_module(epoch, "k1", "aircraft", BLOB)
        store.commit_module(epoch, "k2", "birds", b"birds")
        code, _, message = job("store", "remove", disk.uri, "run", "birds")
        assert code == 2
        assert "held by alice" in message
        assert "--take-over" in message
        store.release(epoch)
        assert "birds" in job("store", "list", disk.uri, "run")[1]
        assert json.loads(job("store", "list", disk.uri, "--json")[1])["runs"][0]["tasks"] == 2
        undo = json.loads(job("store", "remove", disk.uri, "run", "birds", "--json")[1])["undo_with"]
        assert "lease" in job("store", "list", disk.uri, "run", "--history")[1]
        assert job("store", "rollback", disk.uri, "run", str(undo))[0] == 0
        assert len(RunStore(disk, "run").modules()) == 2
        code, text, _ = job("store", "remove", disk.uri, "run", "birds")
        assert f" store purge --storage {disk.uri} --run run\n" in text
        assert "1 modules, 5 bytes would be" in job("store", "purge", disk.uri, "run", "--dry-run")[1]
        assert json.loads(job("store", "purge", disk.uri, "run", "--json")[1])["num_bytes"] == 5
        assert job("store", "compact", disk.uri, "run")[0] == 0
        code, text, _ = job("store", "verify", disk.uri, "run")
        assert code == 1  # the store is whole, and its one blob here is no module
        assert "1 problem(s) found" in text
        assert job("store", "export", disk.uri, "run", str(tmp_path / "x.tar"))[0] == 0
        assert job("store", "import", str(tmp_path / "new"), "run", str(tmp_path / "x.tar"))[0] == 0

    def test_damage_is_exit_code_1_and_a_mistake_2_with_one_sentence(self, disk, job):
        store, epoch = held(disk)
        store.commit_module(epoch, "k", "task", BLOB)
        store.commit_module(epoch, "k2", "task2", BLOB)
        store.release(epoch)
        damage(Path(disk.uri, store.log.path(2)))
        code, text, _ = job("store", "verify", disk.uri, "run")
        assert code == 1
        assert "00000002.json" in text
        code, _, message = job("store", "list", disk.uri, "run")
        assert code == 2
        assert "--accept-loss" in message
        assert job("store", "compact", disk.uri, "run", "--accept-loss")[0] == 0
        assert job("store", "list", disk.uri, "run")[0] == 0
        code, _, message = job("store", "list", disk.uri, "nope")
        assert code == 2
        assert message.splitlines()[-1] == f"error: {disk.uri} has no run 'nope'; it has: run"
