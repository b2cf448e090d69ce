"""A run handed on as one file: loads without Ray, answers what the run answers, refuses what it was not made for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from sample_results import sample_results
from stored_run import StoredRun, picture
from tiny_backbone import write_tiny_backbone

import diki_ray
from diki_ray.config import BackboneSection, Config, parse
from diki_ray.errors import ConfigError, CorruptError, DataError
from diki_ray.prediction.bundle import export_bundle
from diki_ray.report.model_card import model_card
from diki_ray.runs.stored_run import config_of
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore

ROOT = Path(__file__).parent.parent.parent
CLASSES = {"warm": ("red", "or|ange <b>", "yellow"), "cold": ("blue", "green")}

Job = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run `two` of two tasks, with the documents that a job leaves, beside image files."""
    folder = tmp_path_factory.mktemp("run")
    method = {"image_depth": 2, "image_length": 2, "text_depth": 1, "text_length": 2}
    run = StoredRun(folder, *CLASSES, name="two", classes=CLASSES, method=method)
    digests = [entry.digest for entry in run.store.modules()]
    run.store.put_document(run.epoch, "results.json", results_of(run.backbone.digest(), digests))
    run.store.release(run.epoch)
    for n in range(3):
        picture("warm" if n % 2 else "cold", 100 + n).save(folder / f"{n}.png")
    return folder


def results_of(backbone: str, digests: list[str]) -> dict[str, Any]:
    results = sample_results(list(CLASSES), "two", epochs=1)
    results["backbone"] |= {"digest": backbone, "name": "tiny"}
    results["config"]["evaluate"]["label_space"] = "task"
    for task, digest in zip(results["tasks"], digests, strict=True):
        task["chance"] = 0.25
        task["module"]["digest"] = digest
    results["zero_shot"] = [0.3, 0.4]
    for name in ("transfer", "average", "forgetting"):
        results["metrics"][name]["mean"] = 0.5
    results["metrics"]["last"] = {"mean": 0.8, "per_task": [0.75, 0.85]}
    return results


def mine(storage: Path) -> str:
    """The run's backbone, in the caller's own word."""
    return str(storage / "tiny_backbone.py")


def told(storage: Path) -> Config:
    return config_of(RunStore.open(str(storage / "storage"), "two"), backbone=BackboneSection(name=mine(storage)))


@pytest.fixture
def bundle(storage: Path, tmp_path: Path) -> Path:
    export_bundle(str(storage / "storage"), "two", str(tmp_path / "bundle"), told(storage))
    return tmp_path / "bundle"


def test_a_bundle_answers_exactly_what_the_predict_job_answers(storage: Path, bundle: Path, job: Job) -> None:
    files = [str(storage / f"{n}.png") for n in range(3)]
    where = ("--storage", str(storage / "storage"), "--run", "two", "--backbone", mine(storage), "--json")
    code, told, _ = job("predict", *files, *where)
    assert code == 0
    model = diki_ray.load(bundle, backbone=mine(storage))
    answers = model.predict(files)
    assert [{"image": f} | asdict(a) for f, a in zip(files, answers, strict=True)] == json.loads(told)
    assert model.predict([Image.open(f) for f in files]) == answers
    assert model.tasks == tuple(CLASSES)
    assert model.class_names == CLASSES["warm"] + CLASSES["cold"]
    assert {a.task for a in answers} == {"warm", "cold"}


def test_open_vocabulary_and_other_kinds_of_images(storage: Path, bundle: Path, tmp_path: Path) -> None:
    model = diki_ray.load(bundle / "bundle.safetensors", backbone=mine(storage))
    (answer,) = model.predict([storage / "0.png"], classes=["a dog", "a cat"], template="{}!")
    assert answer.class_name in ("a dog", "a cat")
    clear = picture("warm", 5)
    clear.putalpha(100)
    for n, image in enumerate((clear, picture("cold", 5).convert("L"), picture("cold", 6).quantize(16))):
        image.save(tmp_path / f"{n}.png")
        assert model.predict([image]) == model.predict([tmp_path / f"{n}.png"])  # as the same file's
    assert model.predict([]) == []


def test_predicting_reading_a_run_and_serving_it_without_a_cluster_import_no_ray(storage: Path, bundle: Path) -> None:
    """Not by way of anything else either."""
    code = (
        "import sys, diki_ray; assert not {'ray', 'torch'} & set(sys.modules)\n"
        f"answers = diki_ray.load({str(bundle)!r}, backbone={mine(storage)!r}).predict([{str(storage / '0.png')!r}])\n"
        "assert answers[0].task == 'cold'\n"
        "import diki_ray.prediction.run_predictor, diki_ray.report.run, diki_ray.serving.app\n"
        "sys.exit('ray' in sys.modules)"
    )
    environment = os.environ | {"DIKI_LIGHT_IMPORT": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=120).returncode == 0


def test_a_bundle_needs_nothing_of_where_it_came_from(bundle: Path) -> None:
    kept = yaml.safe_load((bundle / "config.yaml").read_text())
    assert kept["run"] == {"name": "two", "storage": "runs", "seed": 0, "take_over": False}
    assert sorted(f.name for f in bundle.iterdir()) == ["README.md", "bundle.safetensors", "config.yaml"]
    before = (bundle / "bundle.safetensors").read_bytes()
    assert b"/storage" not in before


def test_the_card_says_what_is_inside_and_nothing_in_a_name_is_markup(bundle: Path) -> None:
    card = (bundle / "README.md").read_text()
    assert "| warm | red, or\\|ange \\<b\\>, yellow | 60 | a warm photo of \\{\\}. |" in card
    assert "| warm | 25.0 | 30.0 | 75.0 |" in card
    assert "| last | 80.0 |" in card
    assert 'diki_ray.load("' in card
    assert "with DIKI (Tang et al., ECCV 2024, arXiv 2407.05342)" in card
    assert "Routing is by the look of an image." in card


@pytest.mark.parametrize(
    ("settings", "paper"),
    [
        ({"name": "zero_shot"}, "2103.00020"),
        ({"name": "concat_prompts"}, "2204.04799"),
        ({"name": "dpw"}, "2604.18075"),
        ({"name": "c_ada"}, "2407.10281"),
        ({"name": "rail"}, "2406.18868"),
        ({"name": "zscl"}, "2303.06628"),
        ({"name": "sequential_lora"}, "2106.09685"),
        ({"name": "sequential_lora", "against_forgetting": "ewc"}, "1612.00796"),
        ({"name": "sequential_lora", "against_forgetting": "badam"}, "2309.08546"),
        ({"name": "sequential_lora", "wise_ft": 0.5}, "2109.01903"),
    ],
)
def test_the_card_names_the_paper_of_the_method_in_use(settings: dict[str, Any], paper: str) -> None:
    header = {
        "method": settings["name"],
        "task": "a",
        "class_names": ["x"],
        "templates": ["{}"],
        "count": 1,
        "provenance": {},
    }
    config = parse({"run": {"name": "one"}, "tasks": [{"data": "embedded:digits"}], "method": settings}).model_dump(
        mode="json"
    )
    content = {
        "run": "one",
        "config": config,
        "backbone": {"name": "embedded", "embed_dim": 4, "digest": "0" * 64},
        "modules": [{"header": header, "digest": "0" * 64}],
        "diki_ray": "0",
    }
    card = model_card(content, 1, None)
    assert f"arXiv {paper}" in card
    assert ("arXiv 2407.05342" in card) == (settings["name"] == "concat_prompts")  # whose routing is DIKI's
    assert ("Routing is by the look" in card) == (settings["name"] in ("concat_prompts", "dpw"))


def test_figures_of_other_modules_are_not_on_the_card(storage: Path, tmp_path: Path) -> None:
    store = RunStore.open(str(storage / "storage"), "two")
    epoch, before = store.acquire(this_process("test")), store.version
    store.remove_task(epoch, "cold")
    try:
        export_bundle(str(storage / "storage"), "two", str(tmp_path / "one"), told(storage))
    finally:
        store.roll_back(epoch, before)
        store.release(epoch)
    assert "None: the run's results are of other modules than these." in (tmp_path / "one/README.md").read_text()
    assert diki_ray.load(tmp_path / "one", backbone=mine(storage)).tasks == ("warm",)


def test_another_backbone_is_refused_and_the_right_one_may_lie_elsewhere(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    same = write_tiny_backbone(tmp_path / "same")
    assert diki_ray.load(bundle, backbone=str(same)).tasks == tuple(CLASSES)
    same.write_text(same.read_text().replace("manual_seed(0)", "manual_seed(1)"))
    with pytest.raises(ConfigError, match="does not have the weights of the bundle's"):
        diki_ray.load(bundle, backbone=str(same))


def test_damage_is_said(storage: Path, bundle: Path, tmp_path: Path) -> None:
    path = bundle / "bundle.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="task 1 does not have its checksum"):
        diki_ray.load(bundle, backbone=mine(storage))
    path.write_bytes(b"words")
    with pytest.raises(CorruptError, match="not a safetensors file"):
        diki_ray.load(bundle, backbone=mine(storage))
    with pytest.raises(DataError, match="there is no bundle"):
        diki_ray.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="auto, cpu or cuda"):
        diki_ray.load(bundle, device="tpu")


def test_the_job_exports_or_says_what_is_wrong(storage: Path, tmp_path: Path, job: Job) -> None:
    code, told, _ = job("export", str(storage / "storage"), "two", str(tmp_path / "out"), "--backbone", mine(storage))
    assert (code, (tmp_path / "out/README.md").is_file()) == (0, True)
    assert "its README.md says how to load it" in told
    code, _, said = job("export", str(storage / "storage"), "tow", str(tmp_path / "out"))
    assert (code, said.splitlines()[-1]) == (
        2,
        f"error: {storage}/storage has no run 'tow' that has learnt anything; its runs are: two.",
    )
