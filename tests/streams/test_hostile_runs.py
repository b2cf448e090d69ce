"""Attacks with stored runs: documents, modules and keys whose checksums all hold, and which no run writes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from stored_run import Change, StoredRun, as_json, fill, picture_file, rewritten

from diki_ray.commands.app import run as command
from diki_ray.errors import CorruptError, StorageError, UserError
from diki_ray.learning.module import TaskModule, read_tensors, write_tensors
from diki_ray.prediction.run_predictor import predictor_over, read_modules
from diki_ray.runs.plan import build_method
from diki_ray.runs.verification import problems_of
from diki_ray.serving.app import Service, build_app
from diki_ray.serving.loaded_model import LoadedModel
from diki_ray.serving.settings import Settings
from diki_ray.store.library import key_path, module_path
from diki_ray.store.log import digest_of, seal
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore


@pytest.fixture
def served(tmp_path: Path) -> StoredRun:
    run = StoredRun(tmp_path, "warm")
    run.store.release(run.epoch)
    return run


ENTRIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a time in words": lambda c: c.update(time="now"),
    "a time beyond all dates": lambda c: c.update(time=1e300),
    "a number as a task": lambda c: c.update(task=7),
    "no task": lambda c: c.pop("task"),
    "no key": lambda c: c.pop("key"),
    "a field more": lambda c: c.update(more=1),
    "an unknown kind": lambda c: c.update(kind="explode"),
    "a list as kind": lambda c: c.update(kind=[]),
    "a digest that leaves the folder": lambda c: c.update(digest="../../../etc/passwd"),
    "a negative size": lambda c: c.update(num_bytes=-1),
    "a size as text": lambda c: c.update(num_bytes="1"),
    "metadata that is a list": lambda c: c.update(metadata=[]),
    "an epoch that is true": lambda c: c.update(epoch=True),
    "a lease without holder": lambda c: c.update(kind="lease"),
    "a lease whose holder is a list": lambda c: c.update(kind="lease", metadata={"holder": [], "ttl_s": 1}),
    "a rollback to nothing": lambda c: c.update(kind="rollback"),
    "a rollback to a word": lambda c: c.update(kind="rollback", metadata={"modules": ["x"]}),
    "a task of a megabyte": lambda c: c.update(task="x" * 2**20),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_no_entry_that_no_driver_writes_is_followed(served: StoredRun, name: str) -> None:
    rewritten(Path(served.storage, "runs/colours/log/00000002.json"), ENTRIES[name])
    with pytest.raises(CorruptError, match=r"entry 2|00000002") as refused:
        RunStore.open(served.storage, "colours")
    assert len(str(refused.value)) < 1000
    salvaged = RunStore.open(served.storage, "colours", salvage=True)
    assert any("00000002" in problem.path for problem in problems_of(salvaged))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"content":' + b"[" * 100_000,
        b'{"content":{"x":NaN},"sha256":""}',
        b'{"content":{"x":1e999},"sha256":""}',
        b'{"content":7,"sha256":[]}',
        b"\xff\xfe",
        b'{"content":{},"sha256":"' + b"0" * 5000 + b'"}',
    ],
)
def test_no_entry_that_is_no_document_is_followed(served: StoredRun, data: bytes) -> None:
    Path(served.storage, "runs/colours/log/00000002.json").write_bytes(data)
    with pytest.raises(CorruptError):
        RunStore.open(served.storage, "colours")


def test_a_snapshot_that_no_driver_writes_is_passed_over(served: StoredRun) -> None:
    path = Path(served.storage, "runs/colours/snapshots/00000003.json")
    path.parent.mkdir()
    state = {"format": 1, "seq": 3, "epoch": 1, "lease": 7, "tokens": [], "modules": "theirs", "removed": []}
    path.write_bytes(seal(state))
    store = RunStore.open(served.storage, "colours")
    assert [entry.task for entry in store.modules()] == ["warm"]
    assert any("snapshot" in problem.path for problem in problems_of(store))


def test_a_pipe_as_log_entry_is_a_sentence(served: StoredRun) -> None:
    path = Path(served.storage, "runs/colours/log/00000002.json")
    path.unlink()
    os.mkfifo(path)
    started = time.perf_counter()
    with pytest.raises(StorageError, match="pipe"):
        RunStore.open(served.storage, "colours")
    assert time.perf_counter() - started < 10


# Modules


def with_module(served: StoredRun, change: Change, module_format: int = 1) -> RunStore:
    """The run with its module changed; blob, record and entry are named and sealed as if it were right."""
    (entry,) = served.store.modules()
    module = TaskModule.from_bytes(served.store.read_module(entry.digest))
    if module_format == 1:
        module = replace(module, statistics=None)
    header, tensors = read_tensors(module.to_bytes())
    tensors = {name: array.copy() for name, array in tensors.items()}
    change(header, tensors)
    blob = write_tensors(header, tensors)
    named = {"digest": digest_of(blob), "num_bytes": len(blob)}
    Path(served.storage, module_path(named["digest"])).write_bytes(blob)
    rewritten(Path(served.storage, key_path(entry.key)), lambda c: c.update(named))
    rewritten(Path(served.storage, f"runs/colours/log/{entry.seq:08d}.json"), lambda c: c.update(named))
    return RunStore.open(served.storage, "colours")


MODULES: dict[str, Change] = {
    "NaN in the mean": fill("moments/mean", np.nan),
    "infinity in the scatter": fill("moments/scatter", np.inf),
    "a negative variance": fill("moments/scatter", -1.0),
    "NaN in a parameter": fill("parameters/", np.nan),
    "NaN as count": lambda h, t: h.update(count=float("nan")),
    "a count as text": lambda h, t: h.update(count="60"),
    "a negative count": lambda h, t: h.update(count=-3),
    "no count": lambda h, t: h.pop("count"),
    "a format of tomorrow": lambda h, t: h.update(format=9),
    "a format as list": lambda h, t: h.update(format=[]),
    "classes as a word": lambda h, t: h.update(class_names="red"),
    "classes as numbers": lambda h, t: h.update(class_names=[1, 2]),
    "no class": lambda h, t: h.update(class_names=[]),
    "a template with another brace": lambda h, t: h.update(templates=["a {} {x}"]),
    "a template that fills memory": lambda h, t: h.update(templates=["{:>2000000000}"]),
    "a scatter of another size": lambda h, t: t.update({"moments/scatter_packed": np.zeros(3)}),
    "a mean that is a matrix": lambda h, t: t.update({"moments/mean": np.zeros((2, 2))}),
    "validation in one dimension": lambda h, t: t.update({"validation_features": np.zeros(4, np.float16)}),
    "no mean": lambda h, t: t.pop("moments/mean"),
    "provenance as list": lambda h, t: h.update(provenance=[]),
}


WITH_CLASSES: dict[str, Change] = {
    "NaN in a parameter": fill("parameters/", np.nan),
    "an image more than it counts": fill("statistics/counts", 10_000),
    "a negative number of images": fill("statistics/counts", -1),
    "no counts": lambda h, t: t.pop("statistics/counts"),
    "counts of one class": lambda h, t: t.update({"statistics/counts": np.zeros(1, np.int64)}),
    "sums that are no bytes": lambda h, t: t.update({"statistics/first": np.zeros((2, 64))}),
    "sums of nothing": lambda h, t: t.update({"statistics/second": np.zeros((0,), np.uint8)}),
    "a class more": lambda h, t: h["class_names"].append("more"),
    "dimensions that fill memory": lambda h, t: t.update({"statistics/first": np.zeros((1, 2, 10**6), np.uint8)}),
}


@pytest.mark.parametrize("name", WITH_CLASSES)
def test_no_class_statistics_that_no_run_leaves_are_read(served: StoredRun, name: str) -> None:
    store = with_module(served, WITH_CLASSES[name], module_format=2)
    with pytest.raises(CorruptError):
        read_modules(store)
    assert len(problems_of(store)) == 1


@pytest.mark.parametrize("name", MODULES)
def test_no_module_that_no_run_leaves_is_read(served: StoredRun, name: str) -> None:
    store = with_module(served, MODULES[name])
    with pytest.raises(CorruptError, match="not a") as refused:
        read_modules(store)
    assert len(str(refused.value)) < 1000
    assert [p.what.startswith("module of task 'warm': ") for p in problems_of(store)] == [True]


def test_statistics_that_are_no_gaussian_are_refused_when_answers_are_asked_for(served: StoredRun) -> None:
    def opposed(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["moments/scatter_packed"][1] = 1e6  # far more covariance than the variances allow

    store = with_module(served, opposed)
    with pytest.raises(UserError, match="not positive definite"):
        predictor_over(served.config, build_method(served.config, served.backbone), read_modules(store), None)


@pytest.fixture
def overflowing(served: StoredRun) -> StoredRun:
    """A run whose module has finite numbers only, of which each answer is NaN."""

    def huge(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            if name.startswith("parameters/"):
                tensors[name][:] = 3e38

    with_module(served, huge)
    return served


def test_no_image_is_answered_with_what_is_not_finite(
    overflowing: StoredRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(picture_file("warm", 1))
    where = ["--storage", overflowing.storage, "--run", "colours", "--backbone", overflowing.config.backbone.name]
    assert command("predict", [str(image), "--json", *where]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: the logits of an image are not finite numbers")


def test_a_server_says_that_what_it_serves_is_not_finite(overflowing: StoredRun) -> None:
    settings = Settings(storage=overflowing.storage, run="colours", backbone=overflowing.config.backbone.name)
    service = Service(settings, LoadedModel(settings))
    with TestClient(build_app(service)) as client:
        refused = client.post("/predict", json=as_json(picture_file("warm", 1)))
        assert refused.status_code == 500
        assert "not finite" in refused.json()["error"]
        assert client.get("/healthz").status_code == 200
    service.close()


# A stranger's run


def strangers_module(served: StoredRun, key: str) -> None:
    """A record in the library under somebody's key that leads to the module of another."""
    (entry,) = served.store.modules()
    record = {"key": key, "digest": entry.digest, "num_bytes": entry.num_bytes, "metadata": {}}
    Path(served.storage, key_path(key)).write_bytes(seal(record))


def test_a_key_that_leads_to_the_module_of_another_feeds_no_run(served: StoredRun) -> None:
    wanted = "f" * 64
    strangers_module(served, wanted)
    victim = RunStore.open(served.storage, "victim")
    epoch = victim.acquire(this_process("test"))
    assert victim.adopt_module(epoch, wanted, "warm") is None
    assert victim.find_in_library(wanted) is None
    assert victim.adopt_module(epoch, "0" * 64, "warm") is not None  # its own key, which the module says itself


def test_an_imported_module_feeds_no_other_run_and_still_answers_in_its_own(served: StoredRun, tmp_path: Path) -> None:
    tar, home = str(tmp_path / "run.tar"), str(tmp_path / "home")
    served.store.export(tar)
    imported = RunStore.import_(home, "theirs", tar)
    assert [module.task for module in read_modules(imported)] == ["warm"]
    victim = RunStore.open(home, "victim")
    assert victim.adopt_module(victim.acquire(this_process("test")), "0" * 64, "warm") is None
    assert problems_of(imported) == ()
    again = str(tmp_path / "again.tar")
    imported.export(again)  # and can be handed on
    assert len(RunStore.import_(str(tmp_path / "third"), "mine", again).modules()) == 1


def test_a_run_whose_keys_are_not_its_modules_own_is_not_imported(served: StoredRun, tmp_path: Path) -> None:
    wanted = "f" * 64
    strangers_module(served, wanted)
    rewritten(Path(served.storage, "runs/colours/log/00000002.json"), lambda c: c.update(key=wanted))
    with pytest.raises(UserError, match="is not the one that its key says"):
        RunStore.import_(str(tmp_path / "home"), "mine", served.storage)
