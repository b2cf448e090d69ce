"""Evaluation of a stored run: its own settings against its results.json, other settings against evaluating each cell
afresh. No cluster."""

from __future__ import annotations

import io
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from tiny_backbone import write_tiny_backbone

from diki_ray.answering.answers import candidate_tasks
from diki_ray.answering.class_features import Candidates, Exact
from diki_ray.answering.configured import build_predictor
from diki_ray.answering.evaluation import Evaluated, report
from diki_ray.clip.backbone import Backbone
from diki_ray.config import Config, parse
from diki_ray.data.stream import eval_batches
from diki_ray.learning.module import TaskModule
from diki_ray.learning.moments import Moments
from diki_ray.runs.evaluate.evaluator import Evaluating, accuracy_of, num_batches_of
from diki_ray.runs.evaluate.stored_evaluation import Asked, evaluate_stored
from diki_ray.runs.plan import Plan, build_method, load_backbone, make_plan
from diki_ray.runs.results import build_results
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore

ROOT = Path(__file__).parent.parent.parent
Job = Callable[..., tuple[int, str, str]]

COLOURS = {"warm": (200, 90, 40), "cold": (40, 90, 200), "grey": (120, 120, 120)}
NAMES = {"warm": ("red", "or[b]ange"), "cold": ("blue", "green", "red"), "grey": ("black", "white")}


@dataclass(frozen=True)
class Stored:
    config: Config
    backbone: Backbone
    plan: Plan
    modules: list[TaskModule]
    results: dict[str, Any]

    @property
    def storage(self) -> str:
        return self.config.run.storage


LIVELY = """\
    with torch.no_grad():
        model.token_embedding.weight.mul_(50)
        model.visual.conv1.weight.mul_(100)
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "resblocks" in name:
                weight.mul_(3)
"""


def write_lively_backbone(folder: Path) -> Path:
    """As they are initialised, random weights give every image and every text nearly the same features; larger ones
    tell them apart."""
    path = write_tiny_backbone(folder)
    path.write_text(path.read_text().replace("    preprocess =", f"{LIVELY}    preprocess ="))
    return path


def write_images(folder: Path, task: str) -> None:
    for label, name in enumerate(NAMES[task]):
        for split, count in (("train", 20), ("test", 9)):
            (folder / split / name).mkdir(parents=True)
            for n in range(count):
                random = np.random.default_rng([label, n, count])
                pixels = random.normal(COLOURS[task], 90, (4, 4, 3))  # a random model sees large patches alone
                buffer = io.BytesIO()
                image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                image.resize((32, 32), Image.Resampling.NEAREST).save(buffer, "PNG")
                (folder / split / name / f"{n}.png").write_bytes(buffer.getvalue())


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """A run of three tasks as a job leaves it: modules, config.yaml, results.json."""
    folder = tmp_path_factory.mktemp("run")
    for task in COLOURS:
        write_images(folder / task, task)
    config = parse(
        {
            "run": {"name": "three", "storage": str(folder / "storage")},
            "tasks": [{"data": str(folder / task), "template": f"a {task} photo of {{}}."} for task in COLOURS],
            "backbone": {"name": str(write_lively_backbone(folder))},
            "method": {"image_depth": 2, "image_length": 2, "text_depth": 2, "text_length": 2},
            "statistics": {"shrinkage": "oas"},
            "calibration": {"scale": 30.0},  # at which weights of this tiny model differ between images
            "evaluate": {"batch_size": 8, "text_grid": 9},
            "data": {"root": str(folder / "prepared")},
        }
    )
    backbone = load_backbone(config)
    method, plan = build_method(config, backbone), make_plan(config, backbone)
    store = RunStore.open(config.run.storage, "three")
    epoch = store.acquire(this_process("test"))
    modules = []
    for number, task in enumerate(plan.tasks):
        images = [b.images for b in eval_batches(task.index, "train", batch_size=64, transform=backbone.preprocess)]
        generator = torch.Generator().manual_seed(number)
        parameters = method.initial(generator, None)
        module = TaskModule(
            key=task.key,
            task=task.name,
            class_names=task.class_names,
            templates=task.templates,
            method="diki",
            parameters={  # small ones for the text: large values make all of its classes the same
                name: (2.0 if name.startswith("image") else 0.1) * torch.randn(p.shape, generator=generator).numpy()
                for name, p in parameters.items()
            },
            moments=Moments.of(torch.cat([backbone.encode_image(i) for i in images])),
            validation_features=np.zeros((0, backbone.embed_dim), np.float16),
            provenance={"num_skipped": {}, "best_epoch": 0, "history": []},
        )
        store.commit_module(epoch, task.key, task.name, module.to_bytes())
        modules.append(module)
    digests = [entry.digest for entry in store.modules()]
    evaluating = Evaluating(config, plan.tasks, digests, store.read_module)
    parts = [evaluating.evaluate(j, range(num_batches_of(config, t))) for j, t in enumerate(plan.tasks)]
    evaluation = accuracy_of(config, plan.tasks, parts)
    results = build_results(plan, modules, digests, evaluation, notes={}, seconds={}, trained=[], command="a test")
    store.put_document(epoch, "config.yaml", config.to_yaml())
    store.put_document(epoch, "results.json", results)
    store.release(epoch)
    assert len(np.unique(evaluation.accuracy)) > 3  # an experiment in which something happens
    assert any(len(set(p[-1].routed.tolist())) > 1 for p in evaluation.predictions)
    assert max(p[-1].weight.std() for p in evaluation.predictions) > 0.1
    return Stored(config, backbone, plan, modules, store.get_document("results.json"))


def evaluated(stored: Stored, **asked: Any) -> Evaluated:
    return evaluate_stored(stored.storage, "three", Asked(**asked), stored.config)


@pytest.mark.parametrize("cache", ["without", "filling it", "from it"])
def test_with_the_runs_own_settings_it_is_the_runs_results(stored: Stored, cache: str) -> None:
    document = report(evaluated(stored, cache=cache != "without"))
    results = stored.results
    for name in ("accuracy", "zero_shot", "metrics", "protocol"):
        assert document[name] == results[name]
    assert [t["routed"] for t in document["test_sets"]] == [t["routed"] for t in results["tasks"]]
    assert document["notes"] == []
    assert not ray.is_initialized()


def afresh(stored: Stored, order: list[int], learnt: int, j: int, routing: str, space: str) -> np.ndarray:
    """[3, N] of test set j after `learnt` tasks of the order, with a predictor that has no others: which images are
    right, how sure, and how far the best logit is ahead."""
    plan, names = stored.plan, [t.class_names for t in stored.plan.tasks]
    own, backbone = order[:learnt], stored.backbone
    modules = [stored.modules[t] for t in own]
    predictor = build_predictor(plan.config, build_method(plan.config, backbone), modules, Exact())
    right, confidence, lead = [], [], []
    for batch in eval_batches(plan.tasks[j].index, "test", batch_size=8, transform=backbone.preprocess):
        frozen = predictor.frozen_features(batch.images)
        routes = predictor.routes(predictor.scores(frozen), routing)  # type: ignore[arg-type]
        candidates = candidate_tasks(space, j, own, len(names))
        blocks = [Candidates.of(backbone, names[t], plan.tasks[t].templates) for t in candidates]
        logits = torch.cat([predictor.logits(batch.images, frozen, routes, block) for block in blocks], 1)
        flat = [name for t in candidates for name in names[t]]
        right += [flat[k] == names[j][y] for k, y in zip(logits.argmax(1).tolist(), batch.labels.tolist(), strict=True)]
        confidence += logits.softmax(1).max(1).values.tolist()
        lead += logits.sort(1).values.diff(dim=1)[:, -1].tolist()
    return np.array([right, confidence, lead])


@pytest.mark.parametrize("routing", ["image", "batch"])
@pytest.mark.parametrize("space", ["task", "seen", "all"])
def test_any_routing_label_space_and_order_is_evaluating_each_cell_afresh(
    stored: Stored, routing: str, space: str
) -> None:
    exact = stored.config.evaluate.model_copy(update={"text_grid": 0})
    asked = Asked(routing, space, ("grey", "warm"))
    run = evaluate_stored(stored.storage, "three", asked, stored.config.model_copy(update={"evaluate": exact}))
    assert [t.name for t in run.test_sets] == ["grey", "warm", "cold"]
    assert [t.learnt_at for t in run.test_sets] == [0, 1, None]
    assert run.settings["protocol"] is None
    order = [2, 0]
    clear = []
    for t, j in zip(run.test_sets, (2, 0, 1), strict=True):
        for learnt in (1, 2):
            right, confidence, lead = afresh(stored, order, learnt, j, routing, space)
            np.testing.assert_allclose(t.confidence[learnt], confidence, atol=1e-5)
            clear += (lead > 1e-4).tolist()  # rounding decides ties
            assert t.correct[learnt][lead > 1e-4].tolist() == right[lead > 1e-4].astype(bool).tolist()
    assert np.mean(clear) > 0.5  # and those that are ties have the same confidence
    assert report(run)["weight_auroc"]["after"][1] is not None


def test_other_splits_and_what_the_run_cannot_do(stored: Stored) -> None:
    validation = evaluated(stored, split="val")
    sizes = [t.index.split("val").num_samples for t in stored.plan.tasks]
    assert [len(t.labels) for t in validation.test_sets] == sizes
    assert validation.settings["protocol"] is None
    for asked, said in (
        ({"order": ("warm", "hot")}, r"--order names tasks of run 'three' \(warm, cold, grey\): 'hot' is none of them"),
        ({"order": ("warm", "warm")}, "each at most once"),
        ({"split": "dev"}, "has no split 'dev'"),
    ):
        with pytest.raises(Exception, match=said) as raised:
            evaluated(stored, **asked)
        assert type(raised.value).__module__ == "diki_ray.errors"


def test_a_removed_task_is_left_out_and_modules_from_elsewhere_are_said(stored: Stored) -> None:
    store = RunStore.open(stored.storage, "three")
    epoch, before = store.acquire(this_process("test")), store.version
    store.remove_task(epoch, "cold")
    other = RunStore.open(stored.storage, "other")
    other_epoch = other.acquire(this_process("test"))
    try:
        run = evaluated(stored)
        assert [t.name for t in run.test_sets] == ["warm", "grey"]
        assert run.notes == ("cold: the run has no module of it; left out",)
        assert run.settings["protocol"] is None
        for module in stored.modules:
            other.commit_module(other_epoch, f"imported-{module.task}", module.task, module.to_bytes())
        run = evaluate_stored(stored.storage, "other", Asked(), stored.config)
        assert report(run)["accuracy"] == stored.results["accuracy"]
        assert "warm: its module was not trained from this configuration and data" in run.notes
    finally:
        store.roll_back(epoch, before)
        store.release(epoch)
        other.release(other_epoch)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    main = runpy.run_path(str(ROOT / "jobs/evaluate.py"))["main"]

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        return main(), *capsys.readouterr()

    return call


def test_the_job_prints_json_and_tables_and_sentences(stored: Stored, job: Job) -> None:
    mine = ("--backbone", stored.config.backbone.name)
    code, told, _ = job(stored.storage, "three", *mine, "--compare", "three", "--json")
    documents = json.loads(told)
    assert code == 0
    assert documents["runs"][0]["accuracy"] == stored.results["accuracy"]
    assert documents["runs"][0] == documents["runs"][1]
    assert documents["comparisons"][0]["metrics"]["last"]["difference"] == 0
    code, shown, _ = job(stored.storage, "three", *mine, "--compare", "three", "--classes", "--order", "warm,grey")
    assert code == 0
    for text in ("cold (not learnt)", "or[b]ange", "ECE", "AUROC", "three less three", "Routed to"):
        assert text in shown
    code, output, said = job(stored.storage, "tree")
    assert (code, output) == (2, "")
    assert f"error: {stored.storage} has no run 'tree' that has learnt anything; its runs are: " in said
