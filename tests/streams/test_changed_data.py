"""Images that came, images taken back, a class more: the module of today's data from the former one's sums."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fake_store import RUN, FakeStore
from learning import learnt, tiny_plan, worker_of
from PIL import Image
from processes import run_ranks

from diki_ray.data import stream
from diki_ray.learning.module import TaskModule
from diki_ray.runs.changed_data import sentence, with_former_modules
from diki_ray.runs.plan import Plan
from diki_ray.store.run_store import RunStore

CLASSES = {"method": {"name": "classes"}}


def draw(folder: Path, name: str, numbers: range) -> None:
    (folder / "train" / name).mkdir(parents=True, exist_ok=True)
    (folder / "test" / name).mkdir(parents=True, exist_ok=True)
    for n in numbers:
        pixels = np.random.default_rng([len(name), ord(name[0]), n]).integers(0, 255, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / ("test" if n % 5 == 0 else "train") / name / f"{n}.png")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    draw(tmp_path / "pets", "cat", range(20))
    draw(tmp_path / "pets", "dog", range(17))
    return tmp_path / "pets"


def plan_of(pets: Path, **sections: object) -> Plan:
    train = {"epochs": 1, "batch_size": 8} | dict(sections.pop("train", {}))  # type: ignore[call-overload]
    return tiny_plan(pets.parent, tasks=[{"data": str(pets), "name": "pets"}], train=train, **sections)


def changed(pets: Path, store: FakeStore, **sections: object) -> tuple[Plan, TaskModule]:
    """The stream learnt again after its data changed."""
    plan = with_former_modules(plan_of(pets, **sections), store)
    learnt(plan, store)
    [entry] = store.modules()
    return plan, TaskModule.from_bytes(store.read_module(entry.digest))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that are decoded to be learnt from."""
    found: list[str] = []
    decode = stream._SplitReader._decode

    def counted(self: stream._SplitReader, *args: object) -> object:
        sample = decode(self, *args)
        if self.split.name == "train" and sample is not None:
            found.append(sample.key)
        return sample

    monkeypatch.setattr(stream._SplitReader, "_decode", counted)
    return found


def test_a_grown_task_reads_only_what_is_new_and_is_the_module_of_all_images(pets: Path, decoded: list[str]) -> None:
    store = learnt(plan_of(pets, **CLASSES))
    draw(pets, "cat", range(20, 31))
    del decoded[:]
    plan, module = changed(pets, store, **CLASSES)
    assert 0 < len(decoded) <= 11 < module.moments.count  # of eleven new images some are held out, others no more
    assert "images came and" in (sentence(plan.tasks[0]) or "")
    entry = store.modules()[0]
    assert entry.metadata["added"] + entry.metadata["removed"] == len(decoded)
    assert entry.metadata["former"] != entry.key
    assert module.to_bytes() == learnt(plan_of(pets, **CLASSES)).blobs[module.key]


def test_an_image_taken_back_and_a_class_more_in_the_middle_of_the_names(pets: Path) -> None:
    store = learnt(plan_of(pets, **CLASSES))
    (pets / "train/cat/3.png").unlink()
    draw(pets, "cow", range(9))
    _, module = changed(pets, store, **CLASSES)
    assert module.class_names == ("cat", "cow", "dog")
    assert module.to_bytes() == learnt(plan_of(pets, **CLASSES)).blobs[module.key]
    shutil.rmtree(pets / "train/dog")
    shutil.rmtree(pets / "test/dog")
    _, module = changed(pets, store, **CLASSES)
    assert module.class_names == ("cat", "cow")
    assert module.to_bytes() == learnt(plan_of(pets, **CLASSES)).blobs[module.key]


def test_without_the_former_data_all_images_are_read(pets: Path, decoded: list[str]) -> None:
    store = learnt(plan_of(pets, **CLASSES))
    draw(pets, "cat", range(20, 31))
    for former in (pets.parent / "prepared").iterdir():
        shutil.rmtree(former)
    del decoded[:]
    plan, module = changed(pets, store, **CLASSES)
    assert plan.tasks[0].former is None
    assert len(decoded) == module.moments.count


def test_sums_of_other_batches_or_of_several_threads_are_not_added_to(pets: Path) -> None:
    """Several threads share the rows of a batch out: an image's features differ with its place in it."""
    store = learnt(plan_of(pets, **CLASSES))
    draw(pets, "cat", range(20, 31))
    for other in ({"batch_size": 16}, {"cpus_per_worker": 2}):
        plan = with_former_modules(plan_of(pets, **CLASSES, train=other), store)
        assert plan.tasks[0].former is None
    torch.set_num_threads(2)
    learnt(plan_of(pets, **CLASSES), store)
    draw(pets, "cat", range(31, 33))
    assert with_former_modules(plan_of(pets, **CLASSES), store).tasks[0].former is None


@pytest.mark.parametrize("method", [{}, {"name": "dpw", "rank": 2}], ids=["diki", "dpw"])
def test_trained_parameters_are_kept_or_trained_anew_as_the_configuration_says(
    pets: Path, decoded: list[str], method: dict[str, object]
) -> None:
    method = {"image_depth": 2, "image_length": 2, "text_depth": 2, "text_length": 2} | method
    store = learnt(plan_of(pets, method=method))
    before = TaskModule.from_bytes(next(iter(store.blobs.values())))
    draw(pets, "cow", range(9))
    plan, kept = changed(pets, store, method=method, train={"changed_data": "keep"})
    trained = [name for name in before.parameters if not name.endswith(("cls_mean", "cls_variance"))]
    assert all(np.array_equal(kept.parameters[name], before.parameters[name]) for name in trained)
    assert kept.provenance["parameters_of"] == before.key != kept.key
    assert "parameters are kept" in (sentence(plan.tasks[0]) or "")
    again = with_former_modules(plan_of(pets, method=method, train={"changed_data": "keep"}), store)
    assert again.pending([kept.key]) == []  # it is learnt, and nothing is learnt from it once more
    del decoded[:]
    plan, anew = changed(pets, store, method=method)
    assert any(not np.array_equal(anew.parameters[name], before.parameters[name]) for name in trained)
    fresh = learnt(plan_of(pets, method=method)).blobs[anew.key]
    assert anew.to_bytes() == fresh
    assert np.array_equal(kept.class_statistics.second, anew.class_statistics.second)


TWO_PARTS = {"num_parts": 2}


def one_of_two(rank: int, pets: str) -> None:
    torch.set_num_threads(1)
    folder = Path(pets).parent / "storage"
    store = FakeStore(folder) if rank == 0 else RunStore.open(str(folder), RUN)
    plan = with_former_modules(plan_of(Path(pets), **CLASSES, train=TWO_PARTS), store)
    dist.init_process_group("gloo", f"file://{pets}/group", world_size=2, rank=rank)
    worker_of(plan, store).learn(plan.tasks[0])
    dist.destroy_process_group()


def test_two_workers_share_what_is_new(pets: Path) -> None:
    learnt(plan_of(pets, **CLASSES, train=TWO_PARTS), FakeStore(pets.parent / "storage"))
    draw(pets, "cat", range(20, 60))
    plan_of(pets, **CLASSES)  # prepares, before two do at once
    run_ranks(one_of_two, str(pets), num_ranks=2)
    [entry] = RunStore.open(str(pets.parent / "storage"), RUN).modules()
    assert entry.metadata["added"] > 8  # more than a batch
    fresh = learnt(plan_of(pets, **CLASSES, train=TWO_PARTS)).run.modules()
    assert entry.digest == fresh[0].digest


def test_the_sums_of_an_imported_run_are_not_added_to(pets: Path, tmp_path: Path) -> None:
    """A stranger's sums would go on under a key that other runs of the storage take up."""
    mine = learnt(plan_of(pets, **CLASSES), FakeStore(tmp_path / "mine"))
    mine.run.export(str(tmp_path / "exported"))
    imported = RunStore.import_(str(tmp_path / "other"), RUN, str(tmp_path / "exported"))
    draw(pets, "cat", range(20, 31))
    today = plan_of(pets, **CLASSES)
    assert with_former_modules(today, mine).tasks[0].former is not None
    assert [entry.task for entry in imported.modules()] == ["pets"]
    assert with_former_modules(today, imported).tasks[0].former is None
