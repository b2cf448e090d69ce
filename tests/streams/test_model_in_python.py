"""A run in Python, without Ray: it learns what the platform learns, in the same store, and tells mistakes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import learnt
from PIL import Image
from stored_run import picture
from tiny_backbone import write_tiny_backbone

import diki_ray
from diki_ray import ContinualModel
from diki_ray.config import parse
from diki_ray.errors import ConfigError, DataError, LeaseHeldError, UserError
from diki_ray.runs.evaluate.stored import Asked, evaluate_stored
from diki_ray.runs.plan import load_backbone, make_plan
from diki_ray.store.held_here import held_here
from diki_ray.store.run_store import RunStore

Make = Callable[..., ContinualModel]
WORDS = ("warm", "cold")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "backbone": {"name": str(write_tiny_backbone(tmp_path))},
        "method": {"image_depth": 2, "image_length": 2, "text_depth": 2, "text_length": 2},
        "train": {"epochs": 1, "batch_size": 16},
    }


@pytest.fixture
def make(tmp_path: Path, settings: dict[str, Any]) -> Make:
    def opened(run: str = "mine", **more: Any) -> ContinualModel:
        return ContinualModel(run, tmp_path / "storage", config=settings | more, verbose=False)

    return opened


def pictures(number: int = 10, first: int = 0) -> tuple[list[Image.Image], list[str]]:
    names = [word for word in WORDS for _ in range(number)]
    return [picture(word, first + n) for n, word in enumerate(names)], names


def folder_of(place: Path, names: tuple[str, ...] = WORDS) -> Path:
    for name in names:
        (place / name).mkdir(parents=True)
        for n in range(10):
            picture(name, n).save(place / name / f"{n}.png")
    return place


def modules(model: ContinualModel) -> dict[str, tuple[str, str]]:
    return {e.task: (e.key, e.digest) for e in RunStore.open(model.storage, model.run).modules()}


@pytest.mark.parametrize("method", ["diki", "classes"])
def test_it_learns_the_modules_of_the_platforms_worker(
    make: Make, settings: dict[str, Any], tmp_path: Path, method: str
) -> None:
    folder, more = folder_of(tmp_path / "weather"), {} if method == "diki" else {"method": {"name": "classes"}}
    model = make(**more).learn("embedded:gems", shots=4).learn(folder, template="{} weather.")
    tasks = [{"data": "embedded:gems", "shots": 4}, {"data": str(folder), "template": "{} weather."}]
    tree = settings | more | {"tasks": tasks, "run": {"name": "run"}, "data": {"root": str(tmp_path / "other")}}
    plan = make_plan(parse(tree), load_backbone(parse(tree)))
    store = learnt(plan)
    assert modules(model) == {e.task: (e.key, e.digest) for e in store.modules()}
    assert model.tasks == ("gems", "weather")
    assert model.classes_[-2:] == ("cold", "warm")


def test_images_in_memory_are_learnt_answered_and_evaluated(make: Make) -> None:
    images, names = pictures()
    model = make().learn(images, names, name="weather")
    assert model.classes_ == ("cold", "warm")
    answered = model.predict([np.asarray(image) for image in images])
    assert (answered == model.predict(images)).all()
    assert set(answered) <= set(WORDS)
    assert model.predict(images[:1], classes=["a"]).tolist() == ["a"]
    assert [answer.class_name for answer in model.answers(images)] == answered.tolist()
    accuracy = model.evaluate()
    assert list(accuracy) == ["weather"]
    results = model.results_
    assert results is not None
    assert results["accuracy"] == [[accuracy["weather"]]]
    assert model.evaluate() == accuracy
    assert model.results_ == results, "nothing had changed"


class Pairs(torch.utils.data.Dataset):
    """As torchvision's data sets are."""

    classes = ("cold", "warm")

    def __init__(self, number: int, first: int = 0) -> None:
        images, names = pictures(number, first)
        self.pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images]
        self.labels = [self.classes.index(name) for name in names]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        return self.pixels[number], self.labels[number]


def test_a_torch_dataset_and_arrays_of_the_same_pixels_are_one_task(make: Make) -> None:
    images, names = pictures()
    arrays = np.stack([np.asarray(image) for image in images])
    model = make().learn(Pairs(10), name="weather")
    before = modules(model)
    numbers = [("cold", "warm").index(name) for name in names]
    model.learn(arrays, names, name="weather").learn(arrays, numbers, name="weather", class_names=("cold", "warm"))
    assert modules(model) == before


def test_splits_that_are_given_are_kept(make: Make) -> None:
    test = pictures(4, first=100)
    model = make().learn({"train": pictures(), "val": Pairs(3, first=50), "test": test}, name="weather")
    (task,) = model.config.tasks
    plan = make_plan(model.config, load_backbone(model.config))
    assert [split.num_samples for split in plan.tasks[0].index.splits.values()] == [20, 6, 8]
    assert model.evaluate()["weather"] == pytest.approx(np.mean(model.predict(test[0]) == test[1]))
    assert task.name == "weather"


def test_it_is_opened_again_learns_more_and_forgets_what_is_removed(make: Make, settings: dict[str, Any]) -> None:
    images, names = pictures()
    make().learn(images, names, name="weather")
    model = make().learn("embedded:gems", shots=4)
    both, answers = modules(model), model.predict(images)
    model.evaluate()
    assert model.tasks == ("weather", "gems")
    model.remove("weather")
    assert modules(model) == {"gems": both["gems"]}
    assert "weather" not in model.config.to_yaml()
    assert list(model.evaluate()) == ["gems"]
    model.remove("gems")
    assert (model.tasks, model.config.tasks) == ((), ())
    model.learn("embedded:gems", shots=4).learn(images, names, name="weather")
    assert modules(model) == both
    assert (model.predict(images) == answers).all()


def test_learning_needs_no_data_of_earlier_tasks(make: Make, tmp_path: Path) -> None:
    images, names = pictures()
    model = make().learn(images, names, name="weather")
    (task,) = model.config.tasks
    shutil.rmtree(task.data)
    model.learn("embedded:gems", shots=4)
    assert model.tasks == ("weather", "gems")
    assert len(model.predict(images)) == len(images)
    with pytest.raises(DataError, match="there is no data set"):
        model.evaluate()


def test_methods_whose_tasks_build_on_each_other_go_on_from_the_last(make: Make, settings: dict[str, Any]) -> None:
    images, names = pictures()
    model = make(method={"name": "sequential_lora"}).learn(images, names, name="weather")
    model.learn("embedded:gems", shots=4)
    plan = make_plan(model.config, load_backbone(model.config))
    assert plan.tasks[1].predecessor == modules(model)["weather"][0]
    assert [task.key for task in plan.tasks] == [key for key, _ in modules(model).values()]


def test_other_commands_read_the_run_and_load_opens_what_is_saved(make: Make, tmp_path: Path) -> None:
    images, names = pictures()
    model = make().learn(images, names, name="weather")
    backbone = model.config.backbone.name
    told = evaluate_stored(model.storage, "mine", Asked(), model.config)
    assert told.test_sets[0].correct[1].mean() == model.evaluate()["weather"]
    model.save(tmp_path / "saved")
    loaded = diki_ray.load(tmp_path / "saved", backbone=backbone)
    assert [a.class_name for a in loaded.predict(images)] == model.predict(images).tolist()


def test_two_writers_are_refused_and_an_interrupted_task_goes_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    images, names = pictures()
    model = make(train={"epochs": 2, "batch_size": 16, "checkpoint_every_steps": 1})
    with held_here(model.storage, "mine", "another"), pytest.raises(LeaseHeldError, match="run 'mine' is held by"):
        model.learn(images, names, name="weather")
    saved = RunStore.save_checkpoint

    def interrupted(*arguments: Any, **named: Any) -> None:
        saved(*arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunStore, "save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.learn(images, names, name="weather")
    assert model.tasks == ()
    store = RunStore.open(model.storage, "mine")
    assert store.state.lease is None, "the run is given back"
    model.learn(images, names, name="weather")
    other = make("other", train={"epochs": 2, "batch_size": 16}).learn(images, names, name="weather")
    assert modules(other) == modules(model)


def test_the_number_of_threads_is_given_back(make: Make) -> None:
    images, names = pictures()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        make().learn(images, names, name="weather")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("no/such/folder",), "there is no data set at"),
        ((pictures()[0], ["cold"]), "20 images and 1 labels"),
        ((pictures()[0], [*[0] * 10, *[1] * 9, 2]), r"has label 2, but there are 2 classes"),
        ((pictures()[0], [*[0] * 10, *[1] * 9, -1]), r"has label -1, but there are 2 classes"),
        ((pictures()[0], [*["cold"] * 19, "wet"]), "'wet' is none of the class names"),
        ((pictures()[0], [0.5] * 20), "neither a number nor a class name"),
        (([], []), "no training images"),
        ((pictures()[0],), "give labels with the images"),
        ((iter(()),), "is no data set"),
        (({"holdout": pictures()},), "'holdout' is no split"),
        ((np.full((2, 8, 8), 12.0), ["cold", "warm"]), "image 0 of train: an image of float64 from 12.0 to 12.0"),
        ((np.zeros((2, 8, 8, 5), np.uint8), ["cold", "warm"]), r"shape \(8, 8, 5\) is no image"),
    ],
)
def test_data_that_cannot_be_learnt_are_refused_with_a_sentence(make: Make, given: Any, sentence: str) -> None:
    model = make()
    with pytest.raises(DataError, match=sentence):
        model.learn(*given, name="weather", class_names=WORDS)
    assert model.tasks == ()


def test_what_else_cannot_be_is_told(make: Make, tmp_path: Path) -> None:
    images, names = pictures()
    with pytest.raises(DataError, match="one class, 'warm'"):
        make().learn(folder_of(tmp_path / "one", ("warm",)))
    with pytest.raises(DataError, match="CLIP knows classes by name: give class_names"):
        make().learn(images, [0] * 20, name="weather")
    with pytest.raises(DataError, match="give name="):
        make().learn(images, names)
    with pytest.raises(DataError, match="labels= is for images in memory"):
        make().learn(folder_of(tmp_path / "two"), names)
    with pytest.raises(ConfigError, match="learnt anything"):
        make().predict(images)
    with pytest.raises(ConfigError, match="learnt anything"):
        make().evaluate()
    with pytest.raises(ConfigError, match="address of a cluster"):
        make("shared", train={"strategy": "deepspeed", "epochs": 1}).learn(images, names, name="weather")
    model = make().learn(images, names, name="weather")
    with pytest.raises(ConfigError, match="another task 'weather'"):
        model.learn(images[::-1], names, name="weather")
    with pytest.raises(ConfigError, match=re.escape("other settings (epochs)")):
        make(train={"epochs": 3, "batch_size": 16}).learn("embedded:gems", shots=4)
    with pytest.raises(UserError, match="has no task 'gems'"):
        model.remove("gems")
    with pytest.raises(DataError, match="given as a list"):
        model.predict(images[0])
    assert model.tasks == ("weather",)


def test_the_class_is_there_at_once_and_needs_no_ray(tmp_path: Path) -> None:
    program = f"""
import sys, diki_ray
assert "torch" not in sys.modules
from diki_ray import ContinualModel
model = ContinualModel("mine", {str(tmp_path)!r}, config={{"method": {{"name": "classes"}}}}, verbose=False)
model.learn("embedded:digits", shots=2)
assert model.evaluate()["digits"] > 0.2
assert len(model.predict([])) == 0
sys.exit("ray" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=240).returncode == 0
