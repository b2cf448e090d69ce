"""The store's promises, without Ray: who may write, and what was acknowledged is never lost."""

import dataclasses
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore
from storage_faults import BLOB, FaultyObjects, damage, elsewhere, held

from diki_ray.errors import CorruptError, DiskFullError, FencedError, LeaseHeldError, StorageError, UserError
from diki_ray.store.objects import BucketObjects
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore

pytest_plugins = ["storage_fixtures"]
pytestmark = pytest.mark.usefixtures("fast")


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
            "import sys; from diki_ray.store.run_store import RunStore; from diki_ray.store.process import *\n"
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
        assert two.modules() == (adopted,)
        assert two.damaged_modules() == ()

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

    def test_a_put_that_meets_its_own_object_is_a_put(self, objects):
        """A service did it and lost the answer, so its client library tried again: 'exists already'."""

        class Retrying(FaultyObjects):
            def put(self, path, data, create_only=False):
                return super().put(path, data, create_only) and not create_only

        store = RunStore(Retrying(objects, 0, ""), "run")
        epoch = store.acquire(elsewhere())
        entry = store.commit_module(epoch, "k", "task", BLOB)
        store.remove_task(epoch, "task")
        store.release(epoch)
        assert entry.seq == 2
        assert [e.kind for e in store.log.entries(1, store.version)] == ["lease", "module", "remove", "release"]
        assert RunStore(objects, "run").verify() == ()

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
        assert store.find_in_library("k") is None
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
