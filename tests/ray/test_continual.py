"""The main job on a real local cluster: learn, run again, add a task, any number of workers."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from job_process import run_job
from rich.console import Console

from diki_ray.config import Config, load
from diki_ray.data.world import tasks as world
from diki_ray.runs.continual import run_continual
from diki_ray.store.run_store import RunStore

ROOT = Path(__file__).parent.parent.parent
DEBUG = ROOT / "configs" / "debug.yaml"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(autouse=True)
def on_the_cluster(local_cluster: str) -> None:
    """Every test here."""


@pytest.fixture
def debug(storage: Path, prepared: Path) -> Callable[..., Config]:
    """configs/debug.yaml with overrides."""
    return lambda *overrides: load(DEBUG, [f"run.storage={storage}", f"data.root={prepared}", *overrides])


def with_my_own_folder(config: Config, folder: Path) -> Config:
    """Three lines of configuration: a folder with one folder of images for each class."""
    for number, (image, label) in enumerate(world.samples("mist", "train", 96)):
        place = folder / world.TASKS["mist"].class_names[label]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number}.jpg")
    tree = config.model_dump()
    tree["tasks"] = [*tree["tasks"], {"data": str(folder), "name": "mist", "template": "a {} in the mist."}]
    return Config.model_validate(tree)


def run(config: Config) -> dict:
    return run_continual(config, Console(quiet=True))


def digests(storage: Path, name: str) -> dict[str, str]:
    return {e.task: e.digest for e in RunStore.open(str(storage), name).modules()}


def test_learn_run_again_add_a_task_and_share_modules(storage: Path, debug: Callable[..., Config]) -> None:
    first = run(debug())
    names = [t["name"] for t in first["tasks"]]
    assert first["trained"] == names
    assert np.shape(first["accuracy"]) == (2, 2)
    assert first["protocol"] == "own/image"
    stored = json.loads((storage / "runs/debug/results/results.json").read_text())
    assert stored == first
    assert yaml.safe_load((storage / "runs/debug/results/config.yaml").read_text())["run"]["name"] == "debug"
    committed = digests(storage, "debug")

    # What changes neither modules nor answers leaves nothing to do: the results are those that are stored.
    console = Console(file=io.StringIO(), width=200)
    changed = ("evaluate.num_workers=2", "train.max_failures=7", "train.checkpoint_every_steps=9", "data.num_threads=1")
    again = run_continual(debug(*changed), console)
    assert "nothing to train or evaluate" in console.file.getvalue()  # type: ignore[attr-defined]
    assert again == first
    assert digests(storage, "debug") == committed

    grown = run(with_my_own_folder(debug(), storage / "my_balloons"))
    assert grown["trained"] == ["mist"]
    assert np.shape(grown["accuracy"]) == (3, 3)
    assert grown["tasks"][2]["class_names"] == sorted(world.TASKS["mist"].class_names)
    assert "mist" in (storage / "runs/debug/results/report.html").read_text()
    np.testing.assert_array_equal(np.array(grown["accuracy"])[:2, :2], first["accuracy"])
    assert digests(storage, "debug") == committed | {"mist": digests(storage, "debug")["mist"]}

    # Another run, another order: it takes the same modules and trains none.
    other = debug("run.name=other", "evaluate.batch_size=100")
    other = Config.model_validate(other.model_dump() | {"tasks": other.model_dump()["tasks"][::-1]})
    reverse = run(other)
    assert reverse["trained"] == []
    assert digests(storage, "other") == committed
    np.testing.assert_allclose(reverse["zero_shot"], first["zero_shot"][::-1], atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("routing", ["image", "batch"])
def test_any_number_of_evaluation_workers_gives_the_same_numbers(
    storage: Path, debug: Callable[..., Config], routing: str
) -> None:
    """Every number of the evaluation, to the last bit, with nothing taken from a cache."""
    run(debug())
    measured = []
    for num_workers in (1, 2):
        shutil.rmtree(storage / "cache", ignore_errors=True)
        name = f"{routing}-{num_workers}"
        config = debug(
            f"run.name={name}",
            f"evaluate.num_workers={num_workers}",
            f"evaluate.routing={routing}",
            "evaluate.batch_size=64",  # a dozen batches of each test set to share out, and a last one that is smaller
        )
        results = run(config)
        assert results["trained"] == []
        measured.append(results)
    one, two = measured
    for name in ("accuracy", "zero_shot", "metrics", "tasks"):
        assert one[name] == two[name], name


@pytest.mark.long
def test_two_parts_train_the_modules_of_one_whoever_computes_them(storage: Path, debug: Callable[..., Config]) -> None:
    """Not the same bytes (sums are rounded in another order), the same module to 1e-5 over these steps; with the number
    of parts in its key. The ledger says that the same samples were consumed. Where the two parts were computed by two
    workers, a run of one worker takes the modules as they are, and the run itself goes on with one."""
    from diki_ray.learning.module import TaskModule

    run(debug())
    results = run(debug("run.name=two", "train.num_workers=2"))
    assert len(results["trained"]) == 2
    one, two = (RunStore.open(str(storage), name) for name in ("debug", "two"))
    by_task = {e.task: TaskModule.from_bytes(one.read_module(e.digest)) for e in one.modules()}
    for entry in two.modules():
        a, b = by_task[entry.task], TaskModule.from_bytes(two.read_module(entry.digest))
        assert a.key != b.key
        assert a.provenance["consumed"] == b.provenance["consumed"]
        for name, expected in a.parameters.items():
            np.testing.assert_allclose(b.parameters[name], expected, atol=1e-5)
        np.testing.assert_allclose(b.moments.scatter, a.moments.scatter, atol=1e-9)
    assert run(debug("run.name=alone", "train.num_parts=2"))["trained"] == []
    assert digests(storage, "alone") == digests(storage, "two")
    assert run(debug("run.name=two")) == results


def test_the_job_ends_with_code_2_and_one_sentence(tmp_path: Path) -> None:
    """As a user sees it: a process of its own, no traceback, nothing half-written."""
    done = run_job("continual", "--config", DEBUG, f"run.storage={tmp_path}/s", "train.epochz=3", code=2)
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "train.epochz: there is no such field" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s").exists()
