"""The exemplar memory: which images are kept, how many, what is computed with them, and what is refused."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_store import FakeStore
from learning import learnt, modules, store_run, tiny_plan
from PIL import Image
from tiny_backbone import write_tiny_backbone
from torch.nn import functional as F

import diki_ray
from diki_ray.clip.backbone import load
from diki_ray.config.methods import METHOD_SECTIONS, ReplaySection
from diki_ray.data.images import decode_image
from diki_ray.errors import CorruptError
from diki_ray.learning.exemplars import (
    NUM_TRANSFORMS,
    Budget,
    Exemplars,
    bregman_information,
    picked,
    quotas,
    scores,
    transforms,
)
from diki_ray.learning.methods import METHODS, SequentialLora, Step
from diki_ray.learning.methods.low_rank import LowRankMethod
from diki_ray.learning.methods.replay import Replay
from diki_ray.learning.module import TaskModule, read_tensors, write_tensors
from diki_ray.learning.parts import StepInParts
from diki_ray.prediction.bundle import BUNDLE, export_bundle
from diki_ray.runs.plan import Plan, build_method
from diki_ray.runs.train.replay import Memory
from diki_ray.runs.train.task_data import TaskData
from diki_ray.store.process import this_process

LORA = {"name": "sequential_lora", "image_depth": 1, "text_depth": 1}


def test_bregman_information_is_what_it_is_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0], [3.0, 1.0]], [[2.0, 0.0], [3.0, 1.0]]])  # two transforms of two images
    expected = (math.log(2) + math.log(math.e**2 + 1)) / 2 - math.log(math.e + 1)
    assert expected == pytest.approx(0.0967758, abs=1e-6)
    assert bregman_information(logits).tolist() == pytest.approx([expected, 0.0], abs=1e-9)


def test_the_other_scores_are_those_of_the_image_as_it_is() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]])
    logits = torch.stack([probabilities.log(), torch.zeros(2, 3)])  # what the second transform says is not asked
    assert scores("confidence", logits).tolist() == pytest.approx([0.3, 0.5], abs=1e-6)
    assert scores("margin", logits).tolist() == pytest.approx([0.5, 1.0], abs=1e-6)
    entropy = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))
    assert scores("entropy", logits).tolist() == pytest.approx([entropy, math.log(2)], abs=1e-6)
    assert scores("margin", torch.zeros(1, 2, 1)).tolist() == [0.0, 0.0]  # a task of one class

    certain, not_so = torch.tensor([[[8.0, 0.0, 0.0], [1.0, 0.9, 0.0]], [[8.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]).unbind(1)
    for kind in ("bregman", "confidence", "margin", "entropy"):  # all are higher where the answer is less certain
        assert scores(kind, certain[:, None]) < scores(kind, not_so[:, None])


@pytest.mark.parametrize(
    ("available", "budget", "expected"),
    [
        ([5, 5, 5], 9, [3, 3, 3]),
        ([1, 8, 5], 10, [1, 5, 4]),  # three each; two that the first cannot use, and one that does not divide
        ([1, 1, 9], 20, [1, 1, 9]),
        ([4, 4, 4, 4], 3, [1, 1, 1, 0]),
        ([0, 2, 9], 6, [0, 2, 4]),
        ([3], 0, [0]),
        ([], 5, []),
    ],
)
def test_quotas_are_equal_and_what_one_class_cannot_use_is_shared_out(
    available: list[int], budget: int, expected: list[int]
) -> None:
    assert quotas(available, budget) == expected


def test_the_lowest_the_highest_or_some_in_equal_steps_are_kept() -> None:
    assert picked(6, 3, "bottom") == [0, 1, 2]
    assert picked(6, 3, "top") == [3, 4, 5]
    assert picked(6, 3, "step") == [0, 2, 4]
    assert picked(6, 0, "step") == picked(6, 0, "top") == []


def task(values: dict[int, list[float]], num_bytes: int = 10) -> Exemplars:
    """By class the scores of its images, which all have so many bytes."""
    labels = np.array([label for label, found in values.items() for _ in found], np.int64)
    found = np.array([score for scores in values.values() for score in scores], np.float64)
    return Exemplars((b"x" * num_bytes,) * len(labels), labels, found)


def test_old_classes_are_truncated_in_the_order_that_they_were_given_once() -> None:
    first = task({0: [0.3, 0.1, 0.2], 1: [0.9, 0.8]})
    budget = Budget(num_images=4, max_bytes=10**6)
    assert budget.kept([first]) == [[1, 2, 4, 3]]
    assert budget.kept([first, task({0: [7.0, 6.0]})]) == [[1, 2, 4], [1]]
    assert Budget(4, 10**6, choice="top").kept([first, task({0: [7.0, 6.0]})]) == [[2, 0, 3], [0]]


def test_steps_are_taken_once_and_then_only_cut_short() -> None:
    budget = Budget(12, 10**6, choice="step")
    new = task({0: [n / 20 for n in range(20)]})
    assert budget.kept([], new) == [[0, 1, 3, 5, 6, 8, 10, 11, 13, 15, 16, 18]]
    stored = [new.chosen(budget.kept([], new)[0])]
    for quota in (12, 6, 4, 3, 3, 2):  # five share 12, and the first has what does not divide
        assert budget.kept(stored)[0] == list(range(quota))
        stored.append(new.chosen(budget.kept(stored, new)[-1]))


def test_as_many_are_kept_as_fit_into_the_bytes() -> None:
    both = [task({0: [1.0, 2.0, 3.0]}), task({0: [1.0, 2.0, 3.0]})]
    assert Budget(6, 60).kept(both) == [[0, 1, 2], [0, 1, 2]]
    assert Budget(6, 59).kept(both) == [[0, 1, 2], [0, 1]]
    assert Budget(6, 29).kept(both) == [[0], [0]]
    assert Budget(6, 9).kept(both) == [[], []]
    large_first = [task({0: [1.0]}, 100), task({0: [1.0, 2.0]}, 10)]
    assert Budget(3, 110).kept(large_first) == [[0], [0]]


def test_a_reservoir_is_a_sample_of_all_images_seen_whatever_their_classes() -> None:
    first, second = task({0: [0.5, 0.1], 1: [0.7]}), task({0: [0.2, 0.6, 0.05, 0.9]})
    budget = Budget(3, 10**6, "reservoir")
    assert budget.kept([first]) == [[0, 1, 2]]
    assert budget.kept([first, second]) == [[1], [0, 2]]  # the lowest of the numbers that all of them drew


def test_twelve_transforms_of_which_the_first_leaves_the_image_as_it_is() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    views = list(transforms(images))
    assert len(views) == NUM_TRANSFORMS == 12
    assert torch.equal(views[0], images)
    assert torch.equal(views[6], images.flip(-1))
    assert {tuple(view.shape) for view in views} == {(2, 3, 16, 16)}
    assert len({view.numpy().tobytes() for view in views}) == 12
    assert [len(view) for view in transforms(torch.zeros(0, 3, 1, 1))] == [0] * 12


@pytest.mark.parametrize("num_parts", [1, 4, 9])
def test_the_loss_of_a_step_is_that_of_its_batch_and_of_its_exemplars(tmp_path: Path, num_parts: int) -> None:
    backbone = load(str(write_tiny_backbone(tmp_path)))
    remedies: dict[str, Any] = {"against_forgetting": "none", "wise_ft": 1.0, "ewc_lambda": 1.0, "badam_std": 0.01}
    remedies["blip_prior"] = 1e-4
    method = SequentialLora(backbone, **remedies, rank=2, alpha=1.0, image_depth=1, text_depth=1)
    generator = torch.Generator().manual_seed(1)
    start = {n: torch.randn(p.shape, generator=generator) * 0.3 for n, p in method.initial(generator).items()}
    pixels = torch.rand(8, 3, 32, 32, generator=generator)
    old = backbone.tokenize(["sun", "moon", "star"], "a {}.")
    classes = torch.tensor([2, 0, 2])
    method.replay = Replay(method, pixels[:3], classes, old, batch_size=99, weight=0.5)
    tokens, labels = backbone.tokenize(["cat", "dog"], "a {}."), torch.tensor([0, 1, 1, 0, 1])

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        def cross_entropy(images: torch.Tensor, own: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            features = method.image_features(images, parameters)
            return F.cross_entropy(backbone.logits(features, method.text_features(own, parameters)), labels)

        replayed = cross_entropy(pixels[:3], old[[0, 2]], torch.tensor([1, 0, 1]))  # among the classes that are there
        return cross_entropy(pixels[3:], tokens, labels) + 0.5 * replayed

    names = list(start)
    trained = {n: p.clone().requires_grad_() for n, p in start.items()}
    expected = torch.autograd.grad(loss(trained), [trained[n] for n in names])
    step = Step(0, 10, 0.1, seed=5, num_parts=num_parts)
    cut = [slice(5 * part // num_parts, 5 * (part + 1) // num_parts) for part in range(num_parts)]
    sums = StepInParts(method, tokens, trained, {}, step).sums([(pixels[3:][s], labels[s]) for s in cut])
    found = (sums[:-3] / sums[-1]).split([p.numel() for p in trained.values()])
    for name, gradient, of_hand in zip(names, found, expected, strict=True):
        torch.testing.assert_close(gradient.view_as(of_hand), of_hand, atol=1e-5, rtol=1e-4, msg=name)


def test_each_step_draws_its_exemplars_anew_and_alike_for_all_parts() -> None:
    replay = Replay(None, torch.zeros(20, 3, 1, 1), torch.arange(20) % 4, torch.zeros(4, 2), batch_size=5, weight=1.0)
    drawn = [
        replay._drawn(Step(n, 10, 0.1, seed=3, part=part, num_parts=2))[0].tolist() for n in (0, 1) for part in (0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
    assert all(len(set(chosen)) == 5 for chosen in drawn)


# A run


def settings(**values: Any) -> dict[str, Any]:
    return LORA | {"replay": {"num_images": 12, "batch_size": 6} | values}


def two_tasks(folder: Path, method: dict[str, Any]) -> Plan:
    tasks = [{"data": f"embedded:{name}", "shots": 2} for name in ("digits", "gems")]
    return tiny_plan(folder, method=method, tasks=tasks, train={"epochs": 1, "batch_size": 7, "lr": 0.05})


@pytest.fixture(scope="module")
def learnt_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, FakeStore]:
    """Two tasks that were learnt with a memory."""
    torch.set_num_threads(1)
    plan = two_tasks(tmp_path_factory.mktemp("replay"), settings())
    return plan, learnt(plan)


@pytest.fixture(scope="module")
def first(learnt_once: tuple[Plan, FakeStore]) -> TaskModule:
    return modules(*learnt_once)[0]


def test_each_module_keeps_exemplars_of_its_own_task_within_the_budget(learnt_once: tuple[Plan, FakeStore]) -> None:
    plan, _ = learnt_once
    first, second = modules(*learnt_once)
    assert first.exemplars is not None
    assert second.exemplars is not None
    assert len(first.exemplars.images) == 12
    assert np.bincount(first.exemplars.labels).tolist() == [2, 2] + [1] * 8  # 12 of ten classes with two images each
    assert len(second.exemplars.images) == 12 - 10  # of twenty classes, those seen first
    assert (first.provenance["replayed"], second.provenance["replayed"]) == ([], [first.key])
    again = TaskModule.from_bytes(second.to_bytes())
    assert again.exemplars is not None
    assert again.exemplars.images == second.exemplars.images
    section = ReplaySection(num_images=12)
    memory = Memory.before(second.key, section, {first.key: first, second.key: second}.__getitem__)
    replay = memory.replay(build_method(plan.config, load(plan.config.backbone.name)))
    assert replay is not None
    assert len(replay.images) == 12
    assert replay.classes.tolist() == [*range(10), *(10 + second.exemplars.labels)]  # after the ten of the first task
    assert len(replay.class_tokens) == len(first.class_names) + len(second.class_names)


def test_those_whose_answers_differ_least_under_the_transforms_are_kept_with_their_labels(
    learnt_once: tuple[Plan, FakeStore], first: TaskModule
) -> None:
    plan, kept = learnt_once[0], first.exemplars
    assert kept is not None
    backbone = load(plan.config.backbone.name)
    method, data = build_method(plan.config, backbone), TaskData(plan.config, plan.tasks[0], backbone)
    batches = [batch for part in range(data.num_parts) for batch in data.part_of("train", part)]
    images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    with torch.no_grad():
        parameters = {name: torch.from_numpy(p) for name, p in first.parameters.items()}
        texts = method.text_features(backbone.tokenize(first.class_names, first.templates[0]), parameters)
        views = [backbone.logits(method.image_features(view, parameters), texts) for view in transforms(images)]
    score = bregman_information(torch.stack(views))
    found = [backbone.preprocess(decode_image(image)) for image in kept.images]
    places = [int((images == image).flatten(1).all(1).nonzero()) for image in found]
    assert labels[places].tolist() == kept.labels.tolist()
    torch.testing.assert_close(score[places], torch.from_numpy(kept.scores), rtol=1e-3, atol=1e-6)
    gone = [place for place in range(len(labels)) if place not in places]
    apart = torch.stack([score[q] - score[p] for p in places for q in gone if labels[p] == labels[q]])
    assert len(apart) == 8
    assert apart.min() > -1e-6  # up to rounding
    assert apart.max() > 1e-5


@pytest.mark.parametrize(
    "values",
    [
        {"score": "margin", "choice": "step", "max_bytes": 3000},
        {"score": "reservoir"},
        pytest.param({"score": "confidence", "choice": "top"}, marks=pytest.mark.long),
        pytest.param({"score": "entropy"}, marks=pytest.mark.long),
        pytest.param({"score": "random"}, marks=pytest.mark.long),
    ],
)
def test_every_score_keeps_a_memory_within_both_budgets(prepared: Path, values: dict[str, Any]) -> None:
    plan = two_tasks(prepared, settings(**values))
    kept = [module.exemplars for module in modules(plan, learnt(plan))]
    budget = Memory(ReplaySection.model_validate({"num_images": 12} | values), ()).budget
    places = budget.kept(kept)
    assert 0 < sum(map(len, places)) <= 12
    assert sum(e.chosen(p).num_bytes for e, p in zip(kept, places, strict=True)) <= budget.max_bytes
    assert all(len({*p}) == len(p) for p in places)


def test_replay_changes_what_is_learnt_and_no_key_of_runs_without_it(
    tmp_path: Path, learnt_once: tuple[Plan, FakeStore]
) -> None:
    without = two_tasks(tmp_path, LORA)
    alone = learnt(without)
    assert not set(alone.blobs) & set(learnt_once[1].blobs)
    plain, replayed = modules(without, alone), modules(*learnt_once)
    assert all(m.exemplars is None and "replayed" not in m.provenance for m in plain)
    assert all("replay" not in m.provenance["method"] for m in plain)
    for name, array in plain[0].parameters.items():
        np.testing.assert_array_equal(array, replayed[0].parameters[name])  # the first task has nothing to replay
    assert any((array != replayed[1].parameters[name]).any() for name, array in plain[1].parameters.items())


def test_a_removed_task_takes_its_exemplars_with_it(tmp_path: Path, learnt_once: tuple[Plan, FakeStore]) -> None:
    plan, memory = learnt_once
    store = store_run(tmp_path / "storage", plan, memory.blobs)
    exemplars = modules(plan, memory)[1].exemplars
    assert exemplars is not None
    files = [path for path in (tmp_path / "storage").rglob("*") if path.is_file()]
    assert any(exemplars.images[0] in path.read_bytes() for path in files)
    epoch = store.acquire(this_process("test"))
    store.remove_task(epoch, plan.tasks[1].name)
    store.purge(epoch)
    files = [path for path in (tmp_path / "storage").rglob("*") if path.is_file()]
    assert len(files) > 2
    assert not any(image in path.read_bytes() for path in files for image in exemplars.images)


def test_a_bundle_hands_no_exemplar_on_and_answers(tmp_path: Path, learnt_once: tuple[Plan, FakeStore]) -> None:
    plan, memory = learnt_once
    store_run(tmp_path / "storage", plan, memory.blobs)
    export_bundle(str(tmp_path / "storage"), "run", str(tmp_path / "bundle"), plan.config)
    bundle = (tmp_path / "bundle" / BUNDLE).read_bytes()
    exemplars = modules(plan, memory)[0].exemplars
    assert exemplars is not None
    assert not any(image in bundle for image in exemplars.images)
    model = diki_ray.load(str(tmp_path / "bundle"), backbone=plan.config.backbone.name)
    [answer] = model.predict([Image.open(io.BytesIO(exemplars.images[0]))])
    assert answer.class_name in model.class_names


# What storage says


def png(size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), "red").save(out, "PNG")
    return out.getvalue()


def bomb() -> bytes:
    """A PNG whose header says 60,000 times 60,000 pixels."""
    data = bytearray(png())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("hostile", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x80\x04cposix\nsystem\n", png()[:40], bomb()])
def test_an_image_in_a_memory_goes_through_the_decoder_of_all_images(
    learnt_once: tuple[Plan, FakeStore], hostile: bytes
) -> None:
    plan, module = learnt_once[0], modules(*learnt_once)[0]
    labels, found = np.array([0, 1]), np.array([0.0, 0.0])
    method = build_method(plan.config, load(plan.config.backbone.name))
    good = module.with_exemplars(Exemplars((png(), png(9)), labels, found))
    assert Memory(ReplaySection(), (good,)).replay(method) is not None
    bad = module.with_exemplars(Exemplars((png(), hostile), labels, found))
    with pytest.raises(CorruptError, match=f"an exemplar of task '{module.task}' cannot be used"):
        Memory(ReplaySection(), (TaskModule.from_bytes(bad.to_bytes()),)).replay(method)


HOSTILE: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "an array less": lambda t: t.pop("exemplars/labels"),
    "a label that is no class": lambda t: t.update({"exemplars/labels": np.array([0, 99])}),
    "a negative label": lambda t: t.update({"exemplars/labels": np.array([0, -1])}),
    "labels as floats": lambda t: t.update({"exemplars/labels": np.array([0.0, 1.0])}),
    "more lengths than bytes": lambda t: t.update({"exemplars/lengths": np.array([10**12, 5])}),
    "lengths that overflow to the sum": lambda t: t.update({"exemplars/lengths": np.array([2**63 - 1, 2**63 - 1])}),
    "a length of nothing": lambda t: t.update({"exemplars/lengths": np.array([0, len(t["exemplars/images"])])}),
    "a score more": lambda t: t.update({"exemplars/scores": np.zeros(3)}),
    "a score that is no number": lambda t: t.update({"exemplars/scores": np.array([0.0, np.nan])}),
    "two dimensions": lambda t: t.update({"exemplars/images": t["exemplars/images"][None]}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_exemplars_that_no_run_leaves_are_read(first: TaskModule, name: str) -> None:
    module = first.with_exemplars(Exemplars((png(), png(9)), np.array([0, 1]), np.zeros(2)))
    header, tensors = read_tensors(module.to_bytes())
    assert TaskModule.from_bytes(write_tensors(header, tensors)).exemplars is not None
    HOSTILE[name](tensors)
    with pytest.raises(CorruptError):
        TaskModule.from_bytes(write_tensors(header, tensors))


@pytest.mark.parametrize("said", [None, "x", [3]])
def test_a_predecessor_that_does_not_say_what_was_before_it_is_refused(first: TaskModule, said: Any) -> None:
    module = first.with_exemplars(None)
    lost = replace(module, provenance=module.provenance | {"replayed": said})
    with pytest.raises(CorruptError, match="does not say what was replayed before it"):
        Memory.before(module.key, ReplaySection(), lambda key: lost)
    without = replace(module, provenance=module.provenance | {"replayed": []})
    with pytest.raises(CorruptError, match="has lost its exemplars"):
        Memory.before(module.key, ReplaySection(), lambda key: without)


def test_every_method_that_goes_on_with_low_rank_factors_has_the_setting() -> None:
    having = {name for name, section in METHOD_SECTIONS.items() if "replay" in section.model_fields}
    assert having == {name for name, method in METHODS.items() if issubclass(method, LowRankMethod)}
