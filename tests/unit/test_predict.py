"""Prediction from a run's storage: without a cluster, without its lease, each image for itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import stored_run
import torch
from PIL import Image
from stored_run import TEMPLATES, StoredRun, picture
from tiny_backbone import write_tiny_backbone

from diki_ray.answering.class_features import Candidates
from diki_ray.errors import ConfigError, DataError
from diki_ray.prediction.run_predictor import Answer, load_predictor, read_image
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore

Job = Callable[..., tuple[int, str, str]]

CLASSES = {task: stored_run.CLASSES[task] for task in ("warm", "cold")}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredRun:
    """A run of two tasks, still held by the driver that wrote it, and trained on another device than there is here."""
    train = {"device": "cuda"}
    return StoredRun(tmp_path_factory.mktemp("run"), "warm", "cold", name="two", classes=CLASSES, train=train)


def answers(stored: StoredRun, images: list[Image.Image]) -> list[Answer]:
    return list(load_predictor(stored.storage, "two", stored.config).answer(images))


def test_an_image_is_routed_to_the_task_it_looks_like(stored: StoredRun) -> None:
    images = [picture("warm", 100), picture("cold", 101), picture("warm", 102)]
    found = answers(stored, images)
    assert [a.task for a in found] == ["warm", "cold", "warm"]
    for a in found:
        assert a.task == max(a.log_densities, key=lambda task: a.log_densities[task])
        assert a.class_name in {name for names in CLASSES.values() for name in names}
        assert 0 < a.weight < 1
        assert 0 < a.confidence <= 1


def test_ruling_tasks_out_by_a_bound_changes_no_answer(stored: StoredRun, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture("warm", 100), picture("cold", 101), picture("warm", 102)]
    expected = answers(stored, images)
    monkeypatch.setattr("diki_ray.prediction.run_predictor.COARSE_FROM_TASKS", 2)
    for found, full in zip(answers(stored, images), expected, strict=True):
        assert (found.class_name, found.task) == (full.class_name, full.task)
        assert found.weight == pytest.approx(full.weight)
        assert set(found.log_densities) < set(full.log_densities)  # the other task was ruled out, and is not shown


def test_an_answer_is_what_the_predictor_computes(stored: StoredRun) -> None:
    """Against the same steps by hand, one image and one block of candidates at a time."""
    loaded = load_predictor(stored.storage, "two", stored.config)
    image = picture("cold", 7)
    (found,) = loaded.answer([image])
    p = loaded.predictor
    pixels = p.backbone.preprocess(image)[None]
    frozen = p.frozen_features(pixels)
    routes = p.routes(p.scores(frozen), "image")
    blocks = [Candidates.of(p.backbone, CLASSES[t], TEMPLATES[t]) for t in CLASSES]
    logits = torch.cat([p.logits(pixels, frozen, routes, block) for block in blocks], dim=1)
    names = [name for block in blocks for name in block.names]
    assert found.class_name == names[int(logits.argmax())]
    assert found.confidence == pytest.approx(float(logits.softmax(1).max()), abs=1e-6)
    assert found.weight == pytest.approx(float(routes.weight), abs=1e-9)
    assert list(found.log_densities.values()) == pytest.approx(p.scores(frozen).log_density[0].tolist())


def test_an_answer_does_not_depend_on_what_else_is_asked(stored: StoredRun) -> None:
    images = [picture(task, seed) for seed in range(20) for task in CLASSES]  # more than one pass holds
    together = answers(stored, images)
    for n in (0, 1, 33):
        (alone,) = answers(stored, [images[n]])
        assert alone.class_name == together[n].class_name
        assert alone.confidence == pytest.approx(together[n].confidence, abs=1e-5)
        assert alone.weight == pytest.approx(together[n].weight, abs=1e-6)


def test_open_vocabulary_answers_among_any_names(stored: StoredRun) -> None:
    predictor = load_predictor(stored.storage, "two", stored.config).among(["a dog", "a cat"], "{}!")
    (found,) = predictor.answer([picture("warm", 1)])
    assert found.class_name in ("a dog", "a cat")
    assert found.confidence >= 0.5
    assert found.task == "warm"
    for names, template in (([], "{}"), (["a", " "], "{}"), (["a"], "no place"), (["a"], "{} {}")):
        with pytest.raises(ConfigError):
            predictor.among(names, template)


def test_a_removed_task_is_not_answered_with(stored: StoredRun) -> None:
    before = stored.store.version
    stored.store.remove_task(stored.epoch, "cold")
    try:
        predictor = load_predictor(stored.storage, "two", stored.config)
        (found,) = predictor.answer([picture("cold", 1)])
        assert predictor.tasks == ("warm",)
        assert found.class_name in CLASSES["warm"]
        assert list(found.log_densities) == ["warm"]
    finally:
        stored.store.roll_back(stored.epoch, before)


def test_below_skip_weight_the_frozen_model_is_named(stored: StoredRun) -> None:
    config = stored.config.model_copy(
        update={"evaluate": stored.config.evaluate.model_copy(update={"skip_weight": 1.0})}
    )
    (found,) = load_predictor(stored.storage, "two", config).answer([picture("warm", 1)])
    assert found.task is None
    assert found.weight > 0


def test_a_backbone_with_other_weights_is_refused(stored: StoredRun, tmp_path: Path) -> None:
    path = write_tiny_backbone(tmp_path)
    path.write_text(path.read_text().replace("manual_seed(0)", "manual_seed(1)"))
    config = stored.config.model_copy(
        update={"backbone": stored.config.backbone.model_copy(update={"name": str(path)})}
    )
    with pytest.raises(ConfigError, match="does not have the weights that run 'two' was made with"):
        load_predictor(stored.storage, "two", config)


def test_runs_that_cannot_answer_are_named(stored: StoredRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run 'tow' that has learnt anything; its runs are: two"):
        load_predictor(stored.storage, "tow")
    young = RunStore.open(str(tmp_path), "young")
    epoch = young.acquire(this_process("test"))
    entry = stored.store.modules()[0]
    young.commit_module(epoch, entry.key, entry.task, stored.store.read_module(entry.digest))
    with pytest.raises(ConfigError, match=r"no results/config\.yaml yet.*--config"):
        load_predictor(str(tmp_path), "young")
    assert load_predictor(str(tmp_path), "young", stored.config).tasks == ("warm",)


def test_unreadable_images_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "not.png").write_bytes(b"words")
    with pytest.raises(DataError, match=r"not\.png cannot be used: not an image"):
        read_image(str(tmp_path / "not.png"))
    with pytest.raises(DataError, match="there is no such file"):
        read_image(str(tmp_path / "none.png"))


def test_the_job_prints_a_table_or_json(stored: StoredRun, tmp_path: Path, job: Job) -> None:
    image = tmp_path / "warm [x].png"
    picture("warm", 5).save(image)
    where = ("--storage", stored.storage, "--run", "two", "--backbone", stored.config.backbone.name)
    code, shown, _ = job("predict", str(image), *where, "--classes", "[b]bold[/b]")
    assert code == 0
    assert "[b]bold[/b]" in shown  # as it is, not as markup
    assert "100.0 %" in shown
    code, told, _ = job("predict", str(image), str(image), *where, "--json")
    assert code == 0
    first, second = json.loads(told)
    assert first == second
    assert set(first) == {"image", "class_name", "confidence", "task", "weight", "log_densities"}


def test_the_job_fails_with_one_sentence_and_code_2(stored: StoredRun, tmp_path: Path, job: Job) -> None:
    picture("warm", 5).save(tmp_path / "good.png")
    (tmp_path / "not.png").write_bytes(b"words")
    good, where = (
        str(tmp_path / "good.png"),
        ("--storage", stored.storage, "--run", "two", "--backbone", stored.config.backbone.name),
    )
    code, output, errors = job("predict", good, str(tmp_path / "not.png"), *where)
    assert (code, output) == (2, "")
    assert errors.splitlines() == [f"error: {tmp_path}/not.png cannot be used: not an image."]
    for arguments, said in (
        ((good,), "give --run (with --storage), or --config"),
        ((good, *where, "--template", "a {}"), "--template is for --classes"),
        ((good, *where, "--classes", "a,,b"), "none may be empty"),
        ((good, *where, "--classes", "a", "--template", "a"), "needs exactly one {}"),
        ((good, "--config", str(tmp_path / "none.yaml")), "give the path of a YAML file"),
    ):
        code, output, errors = job("predict", *arguments)
        assert (code, output) == (2, "")
        assert said in errors
