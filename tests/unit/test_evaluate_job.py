"""Evaluation of a stored run: its own settings against its results.json, other settings against evaluating each cell
afresh. No cluster."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from learning import store_run
from obstore.store import MemoryStore
from PIL import Image
from stored_run import COLOURS, made_up_module
from tiny_backbone import write_tiny_backbone

from diki_ray.answering.answers import candidate_tasks
from diki_ray.answering.class_features import Candidates, Exact
from diki_ray.answering.configured import build_predictor
from diki_ray.answering.figures import Along, report
from diki_ray.answering.routing import NO_TASK
from diki_ray.answering.rows import TOLERANCE
from diki_ray.answering.split_routes import SplitRoutes
from diki_ray.clip.backbone import Backbone
from diki_ray.config import Config, parse
from diki_ray.data.images import decode_image
from diki_ray.data.stream import eval_batches
from diki_ray.errors import DataError
from diki_ray.learning.module import TaskModule
from diki_ray.runs.evaluate.cache import NoCache
from diki_ray.runs.evaluate.split import evaluate_here
from diki_ray.runs.evaluate.stored import Asked, evaluate_stored
from diki_ray.runs.plan import Plan, build_method, load_backbone, make_plan
from diki_ray.runs.progress import BATCHES, SCORES
from diki_ray.runs.results import build_results
from diki_ray.store.caches import Cache
from diki_ray.store.held_here import held_here
from diki_ray.store.objects import BucketObjects
from diki_ray.store.process import this_process
from diki_ray.store.run_store import RunStore

ROOT = Path(__file__).parent.parent.parent
Job = Callable[..., tuple[int, str, str]]

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
    for task in NAMES:
        write_images(folder / task, task)
    config = parse(
        {
            "run": {"name": "three", "storage": str(folder / "storage")},
            "tasks": [{"data": str(folder / task), "template": f"a {task} photo of {{}}."} for task in NAMES],
            "backbone": {"name": str(write_lively_backbone(folder))},
            "method": {"image_depth": 2, "image_length": 2, "text_depth": 2, "text_length": 2},
            "statistics": {"shrinkage": "oas"},
            "routing": {"density": "task"},
            "calibration": {"scale": 30.0},  # at which weights of this tiny model differ between images
            "evaluate": {"batch_size": 8, "text_grid": 9},
            "data": {"root": str(folder / "prepared")},
        }
    )
    backbone = load_backbone(config)
    method, plan = build_method(config, backbone), make_plan(config, backbone)
    modules = []
    for number, task in enumerate(plan.tasks):
        images = [b.images for b in eval_batches(task.index, "train", batch_size=64, transform=backbone.preprocess)]
        module = made_up_module(
            method,
            backbone,
            torch.cat(images),
            seed=number,
            scale=lambda name: 2.0 if name.startswith("image") else 0.1,  # large values make all classes of texts alike
            key=task.key,
            task=task.name,
            class_names=task.class_names,
            templates=task.templates,
            provenance={"num_skipped": {}, "best_epoch": 0, "history": []},
        )
        modules.append(module)
    store = store_run(config.run.storage, plan, {module.key: module.to_bytes() for module in modules})
    digests = [entry.digest for entry in store.modules()]
    evaluation = evaluate_here(plan, digests, store.read_module, [range(3)], "test", NoCache())
    results = build_results(plan, modules, digests, evaluation, notes={}, seconds={}, trained=[], command="a test")
    with held_here(config.run.storage, "three", "test") as run:
        run.put_document("results.json", results)
    assert len(np.unique(evaluation.accuracy())) > 3  # an experiment in which something happens
    last = [evaluation.predict(j, range(3)) for j in range(3)]
    assert any(len(set(p.routed.tolist())) > 1 for p in last)
    assert max(p.weight.std() for p in last) > 0.1
    return Stored(config, backbone, plan, modules, store.get_document("results.json"))


def evaluated(stored: Stored, **asked: Any) -> Along:
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


@pytest.mark.parametrize(
    ("space", "routing"),
    [
        ("task", "image"),
        ("all", "batch"),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("seen", "image"), ("all", "image"))),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("task", "batch"), ("seen", "batch"))),
    ],
)
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


def empty_cache() -> Cache:
    return Cache(BucketObjects("memory://", MemoryStore()))


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    decoded: list[bytes] = []
    monkeypatch.setattr("diki_ray.data.stream.decode_image", lambda data: decoded.append(data) or decode_image(data))
    return decoded


def newly_answered(routes: SplitRoutes) -> int:
    """How many images the third task gives another module, or another weight, than after each task before."""
    after = [routes(range(n)) for n in (1, 2, 3)]
    now = after[2]
    known = [(r.module == now.module) & np.isclose(r.weight, now.weight, rtol=0, atol=TOLERANCE) for r in after[:2]]
    return int((~np.any(known, axis=0) & (now.module != NO_TASK)).sum())


@pytest.mark.parametrize(("routing", "density"), [("image", "task"), ("batch", "task"), ("image", "classes")])
def test_a_task_more_reads_its_test_set_and_the_images_that_are_rerouted(
    stored: Stored, routing: str, density: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cache, decoded = _asked(stored.plan, routing=routing), empty_cache(), count_decoded(monkeypatch)
    config = whole.config.model_dump()
    config["routing"]["density"] = density
    whole = replace(whole, config=Config.model_validate(config))
    store = RunStore.open(stored.storage, "three")
    digests = [entry.digest for entry in store.modules()]

    def found(plan: Plan, kept: Any = cache, order: tuple[int, ...] = (0, 1, 2)) -> Any:
        decoded.clear()
        n = len(plan.tasks)
        return evaluate_here(plan, digests[:n], store.read_module, [order[:n]], "test", kept)

    sizes = [t.index.split("test").num_samples for t in whole.tasks]
    before = found(replace(whole, tasks=whole.tasks[:2]))
    assert len(decoded) == sum(sizes[:2])
    grown = found(whole)
    rerouted = sum(newly_answered(grown.routes[j]) for j in (0, 1))
    if density == "task":
        assert rerouted == sum((grown.routes[j]((0, 1, 2)).module == 2).sum() for j in (0, 1))
    if routing == "image":
        assert rerouted > 0  # an experiment in which something happens
    assert len(decoded) == sizes[2] + rerouted
    assert len(decoded) < sum(sizes) or density == "classes"  # few images tell these classes apart: most weights change
    np.testing.assert_array_equal(grown.accuracy()[:2, :2], before.accuracy())

    afresh = found(whole, empty_cache())
    assert len(decoded) == sum(sizes)
    np.testing.assert_array_equal(grown.accuracy(), afresh.accuracy())
    for j in range(3):
        confidences = [e.predict(j, (0, 1, 2)).confidence for e in (grown, afresh)]
        np.testing.assert_allclose(*confidences, atol=1e-5)
    assert grown.text_feature_error == afresh.text_feature_error

    # Nothing new: nothing is read and, where modules answer for themselves, no worker is made; other candidates need
    # class features and no pixel.
    with monkeypatch.context() as patched:
        if density == "task":
            patched.setattr("diki_ray.runs.evaluate.worker.EvaluationWorker.__init__", None)
        np.testing.assert_array_equal(found(whole).accuracy(), grown.accuracy())
        assert found(whole).text_feature_error == grown.text_feature_error
        assert decoded == []
    spread = found(_asked(whole, label_space="all"))
    assert decoded == []
    np.testing.assert_array_equal(spread.accuracy(), found(_asked(whole, label_space="all"), empty_cache()).accuracy())


def test_another_calibration_reads_images_again_and_keeps_no_row_twice(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, decoded, store = empty_cache(), count_decoded(monkeypatch), RunStore.open(stored.storage, "three")
    digests, results = [entry.digest for entry in store.modules()], []
    for scale in (30.0, 25.0, 30.0):
        calibration = stored.config.calibration.model_copy(update={"scale": scale})
        plan = replace(stored.plan, config=stored.config.model_copy(update={"calibration": calibration}))
        decoded.clear()
        results.append(evaluate_here(plan, digests, store.read_module, [range(3)], "test", cache))
        # All but images so far from every task that their weight is 0 at any scale.
        assert len(decoded) >= 0.95 * sum(len(a.labels) for a in results[0].test_sets)
    np.testing.assert_array_equal(results[2].accuracy(), results[0].accuracy())
    rows = [{t: len(r) for t, r in a.rows.items()} for e in results for a in e.test_sets]
    assert rows[:3] == rows[6:]


def test_what_is_computed_after_the_last_batch_is_counted_too(stored: Stored) -> None:
    store, told = RunStore.open(stored.storage, "three"), list[tuple[str, int, int]]()
    digests = [entry.digest for entry in store.modules()]
    evaluate_here(
        stored.plan, digests, store.read_module, [range(3)], "test", NoCache(), lambda *event: told.append(event)
    )
    assert list(dict.fromkeys(what for what, _, _ in told)) == [BATCHES, SCORES]
    modules = [(done, total) for what, done, total in told if what == SCORES]
    assert modules == [(done, 4) for done in range(5)]  # three and the frozen model


def _asked(plan: Plan, **evaluate: Any) -> Plan:
    changed = plan.config.evaluate.model_copy(update=evaluate)
    return replace(plan, config=plan.config.model_copy(update={"evaluate": changed}))


def test_an_image_that_cannot_be_read_again_is_said(stored: Stored, tmp_path: Path) -> None:
    cache, store = empty_cache(), RunStore.open(stored.storage, "three")
    digests = [entry.digest for entry in store.modules()]
    first = replace(stored.plan, tasks=stored.plan.tasks[:1])
    evaluate_here(first, digests[:1], store.read_module, [(0,)], "test", cache)
    folder = tmp_path / "damaged"
    shutil.copytree(first.tasks[0].index.uri, folder)
    for shard in folder.glob("test-*.tar"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    calibration = stored.config.calibration.model_copy(update={"scale": 25.0})
    damaged = replace(first.tasks[0], index=replace(first.tasks[0].index, uri=str(folder)))
    plan = replace(first, tasks=(damaged,), config=stored.config.model_copy(update={"calibration": calibration}))
    with pytest.raises(DataError, match="could not be used and the budget is 0"):
        evaluate_here(plan, digests[:1], store.read_module, [(0,)], "test", cache)


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


def test_the_job_prints_json_and_tables_and_sentences(stored: Stored, job: Job) -> None:
    mine = ("--backbone", stored.config.backbone.name)
    code, told, _ = job("evaluate", stored.storage, "three", *mine, "--compare", "three", "--json")
    documents = json.loads(told)
    assert code == 0
    assert documents["runs"][0]["accuracy"] == stored.results["accuracy"]
    assert documents["runs"][0] == documents["runs"][1]
    assert documents["comparisons"][0]["metrics"]["last"]["difference"] == 0
    code, shown, _ = job(
        "evaluate", stored.storage, "three", *mine, "--compare", "three", "--classes", "--order", "warm,grey"
    )
    assert code == 0
    for text in ("cold (not learnt)", "or[b]ange", "ECE", "AUROC", "three less three", "Routed to"):
        assert text in shown
    code, output, said = job("evaluate", stored.storage, "tree")
    assert (code, output) == (2, "")
    assert f"error: {stored.storage} has no run 'tree' that has learnt anything; its runs are: " in said
