"""The interface between a method and the platform: every kind of method is learnt, resumed, evaluated and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import evaluated, learnt, learnt_through_kills, modules, planned, store_run
from torch import Tensor
from torch.nn import functional as F

from diki_ray.answering.figures import report
from diki_ray.clip.residual import Parameters
from diki_ray.errors import ConfigError
from diki_ray.learning.methods import METHODS, Diki, Method, Step, TrainingBatch
from diki_ray.runs.evaluate.stored import Asked, evaluate_stored

DIKI = {"image_depth": 1, "image_length": 2, "text_depth": 1, "text_length": 2}


class Everything(Diki):
    """A sequential method with one of everything that a method may keep, draw, add or sum."""

    sequential = True
    answering = "latest"

    def initial(self, generator: torch.Generator, predecessor: Parameters | None = None) -> Parameters:
        if predecessor is not None:
            return {n: p for n, p in predecessor.items() if n != "count"}
        own = super().initial(generator)
        return own | {f"average.{n}": p.clone() for n, p in own.items()}

    @staticmethod
    def is_trained(name: str) -> bool:
        return not name.startswith(("average.", "count"))

    def effective(self, parameters: Parameters, step: Step | None = None) -> Parameters:
        if step is None:
            return {n.removeprefix("average."): p for n, p in parameters.items() if n.startswith("average.")}
        return {n: p for n, p in parameters.items() if self.is_trained(n)}

    def extra_loss(self, parameters: Parameters, step: Step) -> Tensor:
        drawn = torch.randn(7, generator=step.generator())[step.share(7)]
        return step.mean(drawn**2 * parameters["image.layer0.values"].square().sum(), 7)

    def after_step(self, parameters: Parameters, gradients: Parameters, step: Step) -> None:
        for name in gradients:
            parameters[f"average.{name}"].lerp_(parameters[name], 0.5)

    def sums(self, parameters: Parameters, batch: TrainingBatch) -> Parameters:
        return {"count": F.one_hot(batch.labels, len(batch.class_tokens)).sum(0)}


class ClassMeans(Method):
    """A closed-form method: nothing is trained; images are answered by the nearest of all class means learnt."""

    name, version, answering = "diki", 1, "joint"

    def __init__(self, backbone: Any, **settings: Any):
        super().__init__(backbone)

    def initial(self, generator: torch.Generator, predecessor: Parameters | None = None) -> Parameters:
        return {}

    def image_features(self, images: Tensor, parameters: Parameters, weight: float | Tensor = 1.0) -> Tensor:
        return self.backbone.encode_image(images)

    def text_features(self, tokens: Tensor, parameters: Parameters, weight: float | Tensor = 1.0) -> Tensor:
        return self.backbone.encode_text(tokens)

    def sums(self, parameters: Parameters, batch: TrainingBatch) -> Parameters:
        return {"sum": F.one_hot(batch.labels, len(batch.class_tokens)).double().T @ batch.features.double()}

    def join(self, learnt: Any) -> dict[str, Tensor]:
        return {
            name: F.normalize(torch.from_numpy(m.parameters["sum"][c].astype("float32")), dim=0)
            for m in learnt
            for c, name in enumerate(m.class_names)
        }

    def joint_logits(self, joined: Any, features: Tensor, zero_shot: Tensor, names: Any) -> Tensor:
        known = torch.tensor([name in joined for name in names])
        means = torch.stack([joined.get(name, torch.zeros(features.shape[1])) for name in names])
        return torch.where(known, 100 * features @ means.T, zero_shot)


def test_nothing_trained_is_the_zero_shot_row_after_every_task(prepared: Path) -> None:
    plan = planned(prepared, {"name": "zero_shot"})
    store = learnt(plan)
    assert all(m.parameters == {} and m.provenance["history"] == [] for m in modules(plan, store))
    assert all(m.moments.count > 0 for m in modules(plan, store))
    evaluation = evaluated(plan, store)
    np.testing.assert_array_equal(evaluation.accuracy(), [evaluation.zero_shot()] * 2)


def test_a_sequential_method_is_answered_by_its_latest_module(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "diki", Everything)
    plan = planned(prepared, DIKI, "train.epochs=2", "train.lr=20")
    store = learnt(plan)
    first, second = modules(plan, store)
    assert first.parameters["count"].tolist() == [4.0] * len(first.class_names)  # four shots a class
    assert set(second.parameters) == set(first.parameters)
    assert not np.array_equal(first.parameters["image.layer0.keys"], second.parameters["image.layer0.keys"])
    evaluation = evaluated(plan, store)
    for j in range(2):
        for i in range(2):
            prediction = evaluation.predict(j, range(i + 1))
            assert set(prediction.routed.tolist()) == {i}
            assert set(prediction.weight.tolist()) == {1.0}


def test_a_sequential_method_killed_between_any_steps_is_bit_equal(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "diki", Everything)
    plan = planned(prepared, DIKI, "train.min_steps=6", "train.lr=20", "train.checkpoint_every_steps=1")
    undisturbed = learnt(plan)
    assert [len(m.provenance["history"]) for m in modules(plan, undisturbed)] == [2, 2]  # epochs of 3 steps
    assert learnt_through_kills(plan, (0, 2), (1, 1)).blobs == undisturbed.blobs


def test_a_closed_form_method_answers_from_all_that_is_learnt(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "diki", ClassMeans)
    plan = planned(prepared, DIKI)
    store = learnt(plan)
    evaluation = evaluated(plan, store)
    assert evaluation.accuracy()[0, 1] == evaluation.zero_shot()[1]  # not learnt yet
    assert evaluation.accuracy()[0, 0] == evaluation.accuracy()[1, 0] > evaluation.zero_shot()[0]
    turned = evaluated(plan.in_order((1, 0)), store)
    assert turned.accuracy()[0, 1] == evaluation.zero_shot()[0]
    assert turned.accuracy()[1].tolist() == evaluation.accuracy()[1, ::-1].tolist()  # order-independent at the end


def test_another_order_of_a_sequential_run_is_refused_and_its_first_tasks_are_not(
    prepared: Path, tmp_path: Path
) -> None:
    plan = planned(prepared, {"name": "sequential_lora", "rank": 1}, f"run.storage={tmp_path}")
    memory, run = learnt(plan), plan.config.run.name
    store_run(tmp_path, plan, memory.blobs)
    first, second = (task.name for task in plan.tasks)
    with pytest.raises(ConfigError, match=r"--order: each module .* was trained from the one before it"):
        evaluate_stored(str(tmp_path), run, Asked(order=(second, first)))
    alone = report(evaluate_stored(str(tmp_path), run, Asked(order=(first,))))
    np.testing.assert_allclose(alone["accuracy"][0], evaluated(plan, memory).accuracy()[0], atol=1e-6)


def test_the_documents_example_of_a_method_is_trained_and_answers(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    code = document.split("## Adding a method\n")[1].split("```python\n")[1].split("```")[0]
    assert 20 <= len([line for line in code.splitlines() if line.strip()]) <= 35
    defined: dict[str, Any] = {}
    exec(code, defined)
    method = defined["FeatureAdapter"]
    monkeypatch.setitem(
        METHODS, "diki", type("Chosen", (method,), {"__init__": lambda self, b, **_: method.__init__(self, b)})
    )
    plan = planned(
        prepared, DIKI, "train.epochs=3", "train.optimizer=adamw", "train.lr=0.01", "statistics.shrinkage=oas"
    )
    store = learnt(plan)
    losses = [line["loss"] for line in modules(plan, store)[0].provenance["history"]]
    assert losses[-1] < losses[0]
    evaluation = evaluated(plan, store)
    last, zero_shot = ([evaluation.predict(j, learnt) for j in range(2)] for learnt in ((0, 1), ()))
    assert any((p.best != z.best).any() for p, z in zip(last, zero_shot, strict=True))
    assert any((p.routed == 1).any() for p in last)


def longer(*of_long: dict[str, Any]) -> list[Any]:
    """Settings of the methods that only `make chaos` has time for."""
    return [pytest.param(method, marks=pytest.mark.long) for method in of_long]


@pytest.mark.parametrize("method", [
    {"name": "dpw", "image_depth": 1, "image_length": 2, "text_depth": 1, "text_length": 2, "rank": 2},
    *longer(
        {"name": "concat_prompts", "image_depth": 1, "image_length": 2, "text_depth": 1, "text_length": 2},
        {"name": "c_ada", "image_depth": 1, "text_depth": 1, "rank": 2},
    ),
], ids=["dpw", "concat_prompts", "c_ada"])  # fmt: skip
def test_methods_learn_a_stream_and_are_bit_equal_after_a_kill(prepared: Path, method: dict[str, Any]) -> None:
    plan = planned(prepared, method, "train.lr=0.5", "train.checkpoint_every_steps=1")
    undisturbed = learnt(plan)
    assert learnt_through_kills(plan, (1, 1)).blobs == undisturbed.blobs
    assert evaluated(plan, undisturbed).accuracy().shape == (2, 2)


LORA = {"name": "sequential_lora", "image_depth": 1, "text_depth": 1}


@pytest.mark.parametrize("method", [
    LORA | {"replay": {"num_images": 15, "batch_size": 4}},
    *longer(
        LORA,
        LORA | {"against_forgetting": "ewc"},
        {"name": "zscl", "average_every": 2, "num_reference": 16, "reference_batch": 8},
        LORA | {"wise_ft": 0.5},
        LORA | {"against_forgetting": "badam"},
        LORA | {"against_forgetting": "blip", "blip_prior": 1e-12},
        {"name": "keep_lora", "image_depth": 1, "text_depth": 1, "rank": 2},
        {"name": "snd", "image_depth": 1, "text_depth": 1, "num_reference": 16, "reference_batch": 8},
        {"name": "mulki", "image_depth": 1, "text_depth": 1},
    ),
], ids=["replay", "plain", "ewc", "zscl", "wise_ft", "badam", "blip", "keep_lora", "snd", "mulki"])  # fmt: skip
def test_a_sequential_stream_killed_between_any_steps_is_bit_equal(prepared: Path, method: dict[str, Any]) -> None:
    training = ["train.epochs=2", "train.checkpoint_every_steps=1", "train.optimizer=adamw", "train.lr=0.01"]
    plan = planned(prepared, method, *training)
    undisturbed = learnt(plan)
    assert learnt_through_kills(plan, (0, 1), (1, 1)).blobs == undisturbed.blobs
    first, second = modules(plan, undisturbed)
    assert (first.parameters["image.layer0.q_up"] != second.parameters["image.layer0.q_up"]).any()
    kept = {name for name in second.parameters if "/" in name}
    assert bool(kept) == ("against_forgetting" in method or method["name"] == "keep_lora")
    assert not {"anchor", "average", "before"} & {name.partition("/")[0] for name in kept}  # only training needs them


@pytest.mark.long
def test_metrics_of_classes_go_on_from_domain_to_domain_and_are_bit_equal_after_kills(prepared: Path) -> None:
    """Three styles of the same classes, of which the last is answered before it is learnt."""
    tasks = [{"data": f"embedded:{name}", "shots": 4} for name in ("gems", "gems_sketch", "gems_snow")]
    training = ["train.epochs=2", "train.checkpoint_every_steps=1", "train.optimizer=adamw", "train.lr=0.01"]
    method = {"name": "mahalanobis", "average_decay": 0.9}
    plan = planned(prepared, method, *training, f"tasks={json.dumps(tasks)}")
    undisturbed = learnt(plan)
    assert learnt_through_kills(plan, (0, 1), (1, 1), (2, 2)).blobs == undisturbed.blobs
    first, second, _ = modules(plan, undisturbed)
    assert (first.parameters["low_rank"] != second.parameters["low_rank"]).any()
    assert second.parameters["sums/count"].tolist() == [8.0] * 10
    evaluation = evaluated(plan, undisturbed)
    assert evaluation.accuracy()[1, 2] > evaluation.zero_shot()[2] + 0.1  # never seen


def test_a_stream_learnt_with_rail_keeps_zero_shot_exactly_and_forgets_nothing(prepared: Path) -> None:
    plan = planned(prepared, {"name": "rail", "hidden_dim": 256})
    store = learnt(plan)
    assert all(m.provenance["history"] == [] for m in modules(plan, store))  # no gradient
    given, turned = evaluated(plan, store), evaluated(plan.in_order((1, 0)), store)
    assert given.accuracy()[0, 1] == given.zero_shot()[1]
    assert turned.accuracy()[0, 1] == given.zero_shot()[0]
    np.testing.assert_array_equal(turned.accuracy()[1], given.accuracy()[1, ::-1])
    assert given.accuracy()[1].mean() > given.zero_shot().mean() + 0.05


@pytest.mark.parametrize("routing", ["image", "batch"])
def test_the_class_model_in_all_label_spaces_and_both_routings(prepared: Path, routing: str) -> None:
    classes = {"name": "classes"}
    spaces = {s: f"evaluate.label_space={s}" for s in ("task", "seen", "all")}
    plans = {s: planned(prepared, classes, space, f"evaluate.routing={routing}") for s, space in spaces.items()}
    store = learnt(plans["task"])
    found = {space: evaluated(plan, store) for space, plan in plans.items()}
    for space, evaluation in found.items():
        accuracy, zero_shot = evaluation.accuracy(), evaluation.zero_shot()
        assert accuracy[1].mean() > zero_shot.mean() + 0.05
        assert space == "all" or accuracy[0, 1] == zero_shot[1]  # not learnt yet, and among its own classes
        assert routing == "image" or len(set(evaluation.predict(0, (0, 1)).routed.tolist())) == 1  # by vote
        turned = evaluated(plans[space].in_order((1, 0)), store)
        np.testing.assert_array_equal(turned.accuracy()[1], accuracy[1, ::-1])
    own, seen, among_all = (found[s].predict(0, (0,)) for s in spaces)
    np.testing.assert_array_equal(own.best, seen.best)  # one task is learnt
    assert set(seen.block.tolist()) == {0}
    assert set(among_all.block.tolist()) <= {0, 1}
    np.testing.assert_array_equal(found["seen"].accuracy()[1], found["all"].accuracy()[1])  # both are
