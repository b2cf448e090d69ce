"""Damage to the log, to checkpoints and to what is derived is found, said, and survived."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from storage_faults import BLOB, FaultyObjects, damage, elsewhere, held

from diki_ray.errors import CorruptError, FencedError, LeaseHeldError, StorageError, UserError
from diki_ray.store.caches import Cache
from diki_ray.store.log import Entry, replay, seal
from diki_ray.store.run_store import RunStore

pytest_plugins = ["storage_fixtures"]
pytestmark = pytest.mark.usefixtures("fast")


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
        cache = Cache.open(disk.uri)
        assert cache.get("features-abc") is None
        cache.put("features-abc", BLOB)
        assert cache.get("features-abc") == BLOB == Cache(disk).get("features-abc")
        with pytest.raises(UserError, match="no object name"):
            cache.put("../library/keys/k.json", BLOB)
        damage(Path(disk.uri, "cache/features-abc"))
        assert cache.get("features-abc") is None

    def test_a_damaged_document_is_said(self, disk):
        store, epoch = held(disk)
        store.put_document(epoch, "results.json", {"average": 0.5})
        Path(disk.uri, "runs/run/results/results.json").write_bytes(b'{"average": 0.')
        with pytest.raises(CorruptError, match=r"results\.json is damaged"):
            store.get_document("results.json")
        assert [problem.path for problem in store.verify()] == ["runs/run/results/results.json"]


class TestClocks:
    """Drivers whose clocks differ by hours, and writers in the same millisecond: the order is the entries' numbers."""

    def test_clocks_that_differ_by_hours_lose_nothing_that_was_acknowledged(self, objects, monkeypatch):
        now, offset_h = time.time(), 0.0
        monkeypatch.setattr(time, "time", lambda: now + 3600 * offset_h)
        kept = []
        offset_h = 9.0
        ahead, first = held(objects)
        kept.append(ahead.commit_module(first, "k-0", "ahead", b"ahead"))
        offset_h = 0.0
        with pytest.raises(LeaseHeldError, match=r"run\.take_over=true"):
            held(objects)
        behind, second = held(objects, take_over=True)
        kept.append(behind.commit_module(second, "k-1", "now", b"now"))
        offset_h = 9.0
        with pytest.raises(FencedError):
            ahead.commit_module(first, "k-2", "late", b"late")
        last, third = held(objects)  # to this clock the second lease is over long since
        kept.append(last.commit_module(third, "k-3", "again", b"again"))
        offset_h = -7.0
        with pytest.raises(FencedError):
            behind.renew(second)
        last.compact(third)
        kept.append(last.commit_module(third, "k-4", "before 1970 for all we know", b"before"))
        last.release(third)
        assert held(objects)[1] == 4
        there = RunStore(objects, "run")
        assert [entry.digest for entry in there.modules()] == [entry.digest for entry in kept]
        assert there.verify() == ()

    def test_writers_in_the_same_millisecond_keep_all_they_wrote(self, objects, monkeypatch):
        monkeypatch.setattr(time, "time", lambda: 1e9)
        monkeypatch.setattr(time, "time_ns", lambda: 10**18)
        start = threading.Barrier(8)

        def write(number):
            store, epoch = held(objects, f"run-{number}")
            start.wait(20)
            for step in range(4):
                store.save_checkpoint(epoch, f"k-{number}", step, b"state" * step)
                store.put_document(epoch, "results.json", {"step": step})
                store.commit_module(epoch, f"k-{step}", f"task-{step}", b"the same of all %d" % step)
            store.release(epoch)
            return store

        with ThreadPoolExecutor(8) as pool:
            stores = list(pool.map(write, range(8)))
        for store in stores:
            assert len(RunStore(objects, store.run).modules()) == 4
            assert RunStore(objects, store.run).get_document("results.json") == {"step": 3}
            assert RunStore(objects, store.run).verify() == ()


def test_a_large_document_is_written_without_a_line_for_each_value(disk):
    store, epoch = held(disk)
    for size in (10, 600):
        document = {"accuracy": [[0.123456] * size] * size, "run": "x"}
        store.put_document(epoch, "results.json", document)
        assert store.get_document("results.json") == document
        text = Path(disk.uri, "runs/run/results/results.json").read_text()
        assert text.count("\n") == (size * size + 2 * size + 4 if size == 10 else 0)
