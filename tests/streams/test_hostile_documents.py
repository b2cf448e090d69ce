"""Attacks with the documents and checkpoints of a stored run: all whole, and none as a run writes them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stored_run import Change, StoredRun, fill, picture, rewritten

import diki_ray
from diki_ray.commands.app import run as command
from diki_ray.config import parse
from diki_ray.config.yaml_text import read_tree
from diki_ray.errors import CorruptError
from diki_ray.learning.module import read_tensors, write_tensors
from diki_ray.learning.task_trainer import Recipe, TaskTrainer
from diki_ray.runs.plan import build_method, find_data
from diki_ray.runs.steps import with_parts_of_the_run
from diki_ray.runs.verification import problems_of
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore


@pytest.fixture
def served(tmp_path: Path) -> StoredRun:
    run = StoredRun(tmp_path, "warm")
    run.store.release(run.epoch)
    return run


# Results


RESULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tasks as a number": lambda r: r.update(tasks=3),
    "no task": lambda r: r.update(tasks=[]),
    "a run as a list": lambda r: r.update(run=[]),
    "an accuracy in words": lambda r: r.update(accuracy=[["much"]]),
    "an accuracy of 7": lambda r: r.update(accuracy=[[7.0]]),
    "more accuracies than tasks": lambda r: r["accuracy"][0].append(0.5),
    "seconds of a year in words": lambda r: r["seconds"].update(train="long"),
    "a chance that is true": lambda r: r["tasks"][0].update(chance=True),
    "a uri as a number": lambda r: r["tasks"][0]["data"].update(uri=5),
    "a histogram of nothing": lambda r: r["tasks"][0]["weights"]["learnt"].update(counts=[]),
    "an epoch that there is not": lambda r: r["tasks"][0].update(best_epoch=10**6),
    "half a character": lambda r: r["tasks"][0].update(name="\udc00"),
    "a name of megabytes": lambda r: r["tasks"][0].update(name="x" * 2**21),
    "an error of text features in words": lambda r: r["notes"].update(text_feature_error="small"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_with_fields_that_no_run_writes_are_refused_and_found(
    served: StoredRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = Path(served.storage, "runs/colours/results/results.json")
    results = json.loads(path.read_text())
    RESULTS[name](results)
    path.write_text(json.dumps(results))
    page = tmp_path / "page.html"
    assert command("report", ["colours", "--storage", served.storage, "--output", str(page)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert len(told) < 1000
    assert not page.exists()
    where = ["--storage", served.storage, "--run", "colours"]
    assert command("export", [str(tmp_path / "bundle"), *where, "--backbone", served.config.backbone.name]) == 2
    assert not (tmp_path / "bundle").exists()
    (problem,) = problems_of(served.store)
    assert problem.path == "runs/colours/results/results.json"


@pytest.mark.parametrize("parts", ["[]", '{"num_parts": "2"}', '{"num_parts": -1}', '{"num_parts": 1e9}', "{}"])
def test_parts_that_no_run_writes_are_found(served: StoredRun, parts: str) -> None:
    Path(served.storage, "runs/colours/results/parts.json").write_text(parts)
    (problem,) = problems_of(served.store)
    assert problem.path == "runs/colours/results/parts.json"
    with pytest.raises(CorruptError, match="num_parts"):
        with_parts_of_the_run(served.config)


# Bundles

BUNDLES: dict[str, Change] = {
    "a list as format": lambda h, t: h.update(format=[]),
    "no modules": lambda h, t: h.pop("modules"),
    "modules as a word": lambda h, t: h.update(modules="all"),
    "a module as a number": lambda h, t: h.update(modules=[7]),
    "a digest as a list": lambda h, t: h["modules"][0].update(digest=[]),
    "a header as a list": lambda h, t: h["modules"][0].update(header=[]),
    "no configuration": lambda h, t: h.pop("config"),
    "a configuration as a list": lambda h, t: h.update(config=[]),
    "a backbone as a list": lambda h, t: h.update(backbone=[]),
    "a digest of the backbone's as a number": lambda h, t: h["backbone"].update(digest=5),
    "a run as a number": lambda h, t: h.update(run=5),
}


@pytest.mark.parametrize("name", BUNDLES)
def test_no_bundle_that_no_export_writes_is_loaded(served: StoredRun, tmp_path: Path, name: str) -> None:
    backbone = served.config.backbone.name
    folder = tmp_path / "bundle"
    where = ["--storage", served.storage, "--run", "colours", "--backbone", backbone]
    assert command("export", [str(folder), *where]) == 0
    file = folder / "bundle.safetensors"
    header, tensors = read_tensors(file.read_bytes())
    BUNDLES[name](header, tensors)
    file.write_bytes(write_tensors(header, tensors))
    with pytest.raises(CorruptError, match="is no bundle of format 1") as refused:
        diki_ray.load(folder, backbone=backbone)
    assert len(str(refused.value)) < 1000


# Checkpoints


def trainer_of(served: StoredRun) -> TaskTrainer:
    method = build_method(served.config, served.backbone)
    tokens = torch.zeros(2, 8, dtype=torch.long)
    return TaskTrainer(method, tokens, Recipe(), 4, method.initial(torch.Generator(), None))


def checkpoint_of(served: StoredRun, change: Change) -> tuple[RunStore, dict[str, Any], dict[str, np.ndarray]]:
    """The run with a checkpoint that is whole and sealed, and what is in it."""
    header, arrays = trainer_of(served).state()
    header, arrays = copy.deepcopy(header) | {"consumed": 0}, {n: a.copy() for n, a in arrays.items()}
    change(header, arrays)
    store = RunStore.open(served.storage, "colours")
    epoch = store.acquire(this_process("test"))
    store.save_checkpoint(epoch, "k" * 64, 3, write_tensors(header, arrays))
    store.release(epoch)
    return store, header, arrays


CHECKPOINTS: dict[str, Change] = {
    "no progress": lambda h, t: h.pop("progress"),
    "progress as a list": lambda h, t: h.update(progress=[]),
    "a field more": lambda h, t: h["progress"].update(more=1),
    "a step in words": lambda h, t: h["progress"].update(step="many"),
    "a negative step": lambda h, t: h["progress"].update(step=-1),
    "consumed as text": lambda h, t: h.update(consumed="all"),
    "NaN in a parameter": fill("parameters/", np.nan),
    "NaN in the best": fill("best/", np.nan),
    "a moment of another name": lambda h, t: t.update({"optimizer/x/../y": np.zeros(1)}),
}
OF_ANOTHER_TASK: dict[str, Change] = {
    "no parameters": lambda h, t: [t.pop(n) for n in list(t) if n.startswith("parameters/")],
    "a parameter more": lambda h, t: t.update({"parameters/more": np.zeros(1)}),
    "another shape": lambda h, t: t.update({n: a[:1] for n, a in t.items() if n.startswith("best/")}),
    "moments of no parameter": lambda h, t: t.update({"optimizer/9999/exp_avg": np.zeros(1)}),
}


@pytest.mark.parametrize("name", [*CHECKPOINTS, *OF_ANOTHER_TASK])
def test_no_checkpoint_that_no_training_leaves_is_gone_on_from(served: StoredRun, name: str) -> None:
    store, header, arrays = checkpoint_of(served, (CHECKPOINTS | OF_ANOTHER_TASK)[name])
    resumed = trainer_of(served)
    before = {n: p.detach().clone() for n, p in resumed.all_parameters.items()}
    with pytest.raises(CorruptError, match="not what training writes") as refused:
        resumed.load_state(header, arrays)
    assert len(str(refused.value)) < 1000
    assert all(torch.equal(p, before[n]) for n, p in resumed.all_parameters.items())
    assert len(problems_of(store)) == (name in CHECKPOINTS)  # what another task's are, its checkpoint does not say


@pytest.mark.parametrize(
    "change",
    [
        {"blob": "../../../library/modules/x"},
        {"blob": 7},
        {"step": "3"},
        {"metadata": []},
        {"sha256": None},
    ],
)
def test_a_description_that_no_training_writes_is_passed_over_and_found(
    served: StoredRun, change: dict[str, Any]
) -> None:
    store, _, _ = checkpoint_of(served, lambda h, t: None)
    assert problems_of(store) == ()
    (path,) = Path(served.storage, "runs/colours/checkpoints").rglob("*.json")
    rewritten(path, lambda c: c.update(change))
    assert store.load_checkpoint("k" * 64) is None
    assert len(problems_of(store)) == 1


@pytest.mark.parametrize(
    "results", ["[]", "7", '{"format": 1}', '{"format": 1, "tasks": 3}', "[" * 50_000, '{"a": NaN}']
)
@pytest.mark.parametrize("name", ["report", "predict"])
def test_results_that_no_run_writes_are_a_sentence(
    served: StoredRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], results: str, name: str
) -> None:
    Path(served.storage, "runs/colours/results/results.json").write_text(results)
    picture("warm", 1).save(tmp_path / "image.png")
    asked = ["colours", "--storage", served.storage] if name == "report" else [str(tmp_path / "image.png")]
    if name == "predict":
        asked += ["--storage", served.storage, "--run", "colours", "--backbone", served.config.backbone.name]
    assert command(name, asked) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ")
    assert len(told.err.splitlines()) == 1


def test_a_whole_run_is_found_whole(served: StoredRun) -> None:
    assert command("store", ["verify", "--storage", served.storage, "--run", "colours"]) == 0


def test_names_move_no_cursor(served: StoredRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("report", ["\x1b[2J\x07colours", "--storage", served.storage]) == 2
    assert "\x1b" not in capsys.readouterr().err


# Paths of a stored configuration


def images(folder: Path) -> Path:
    for split, task, n in ((s, t, n) for s in ("train", "test") for t in ("warm", "cold") for n in range(4)):
        (folder / split / task).mkdir(parents=True, exist_ok=True)
        picture(task, n).save(folder / split / task / f"{n}.png")
    return folder


def names_their_folder(served: StoredRun, folder: Path) -> str:
    """The stored configuration names a folder of pictures that are nobody's business, and where to write them."""
    tree = served.config.model_dump(mode="json")
    tree["tasks"] = [{"data": str(images(folder / "private")), "name": "warm"}]
    tree["data"]["root"] = str(folder / "theirs")
    text = parse(tree).to_yaml()
    Path(served.storage, "runs/colours/results/config.yaml").write_text(text)
    return text


def test_evaluation_copies_no_files_that_storage_names(
    served: StoredRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names_their_folder(served, tmp_path)
    where = ["--storage", served.storage, "--run", "colours", "--backbone", served.config.backbone.name]
    assert command("evaluate", where) == 2
    told = capsys.readouterr().err
    assert "read at your own word alone" in told
    assert str(tmp_path / "private") in told
    assert not (tmp_path / "theirs").exists()


def test_of_an_imported_run_no_path_is_looked_at(
    served: StoredRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names_their_folder(served, tmp_path)
    find_data(parse(read_tree(Path(served.storage, "runs/colours/results/config.yaml").read_bytes(), "theirs")))
    home = tmp_path / "home"
    RunStore.import_(str(home), "mine", served.storage)
    shutil.rmtree(tmp_path / "private")  # that it is gone would be an error of its own, were it looked at
    where = ["--storage", str(home), "--run", "mine", "--backbone", served.config.backbone.name]
    assert command("evaluate", where) == 2
    assert "read at your own word alone" in capsys.readouterr().err
