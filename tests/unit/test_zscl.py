"""ZSCL: distillation on data of no task, weight consolidation, and averages of the weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import planned
from tiny_backbone import write_tiny_backbone

from diki_ray.clip.backbone import load
from diki_ray.clip.residual import Parameters
from diki_ray.config import load as load_config
from diki_ray.data.world import tasks as world
from diki_ray.errors import ConfigError
from diki_ray.learning.methods import Step, Zscl
from diki_ray.learning.methods.low_rank import keep, trained
from diki_ray.learning.parts import StepInParts
from diki_ray.runs.plan import build_method, load_backbone, make_plan

DEBUG = Path(__file__).parents[2] / "configs/debug.yaml"
STEP = Step(3, 10, 0.1, 5)
NUM_IMAGES = 6


def method_of(path: Path, **settings: Any) -> Zscl:
    values: dict[str, Any] = {
        "rank": 2,
        "alpha": 1.0,
        "image_depth": 1,
        "text_depth": 1,
        "temperature": 2.0,
        "weight_consolidation": 0.0,
        "average_every": 3,
        "reference_batch": 4,
    }
    method = Zscl(load(str(path)), **(values | settings))
    images = torch.rand(NUM_IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    method.reference = lambda: (images, ["a cat.", "a red star.", "two dogs.", "snow.", "the digit nine."])
    return method


def moved(method: Zscl) -> Parameters:
    """A start, and factors that have moved away from it."""
    generator = torch.Generator().manual_seed(1)
    parameters = method.initial(generator)
    return parameters | {n: torch.randn(p.shape, generator=generator) * 0.3 for n, p in trained(parameters).items()}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_backbone(tmp_path)


def loss_of(method: Zscl, parameters: Parameters) -> torch.Tensor:
    """The method's own loss in one part, as the platform asks for it."""
    features, _ = method.shared_rows(parameters, STEP)
    return method.extra_loss(parameters, replace(STEP, shared=features))


def test_the_distillation_is_the_cross_entropy_between_softened_similarities_both_ways(tiny: Path) -> None:
    method = method_of(tiny, reference_batch=99)  # all images and all captions
    parameters = moved(method)
    loss = loss_of(method, parameters)

    images, captions = method.reference()
    backbone = method.backbone
    with torch.no_grad():
        texts = backbone.encode_text(backbone.tokenizer(list(captions)))
        student = method.image_features(images, trained(parameters))
        scale = backbone.model.logit_scale.exp()
        now, then = (scale * features @ texts.T for features in (student, backbone.encode_image(images)))

    def cross_entropy(now: torch.Tensor, then: torch.Tensor) -> float:
        rows = -((then / 2).softmax(1) * (now / 2).log_softmax(1)).sum(1)
        return 4 * rows.mean().item()

    assert loss.item() == pytest.approx(cross_entropy(now, then) + cross_entropy(now.T, then.T), rel=1e-5)


def test_nothing_pulls_at_the_weights_while_they_are_the_pre_trained_ones(tiny: Path) -> None:
    method = method_of(tiny, weight_consolidation=1.0)
    parameters = method.initial(torch.Generator().manual_seed(1))
    parameters = {n: p.requires_grad_(method.is_trained(n)) for n, p in parameters.items()}
    ups = [p for n, p in parameters.items() if n.startswith("image.") and n.endswith("_up")]
    at_start = torch.autograd.grad(loss_of(method, parameters), ups)
    with torch.no_grad():
        for up in ups:
            up += 0.3
    elsewhere = torch.autograd.grad(loss_of(method, parameters), ups)
    assert max(g.abs().max() for g in at_start) < 1e-4 * max(g.abs().max() for g in elsewhere)


def test_the_consolidated_distance_is_of_the_weights_and_not_of_their_factors(tiny: Path) -> None:
    method = method_of(tiny)
    one, other = trained(moved(method)), trained(method.initial(torch.Generator().manual_seed(4)))
    other = {n: p + 0.1 for n, p in other.items()}
    expected = 0.0
    for name in one:
        if name.endswith("_down"):
            up = name.replace("_down", "_up")
            expected += (0.5 * (one[up] @ one[name] - other[up] @ other[name])).square().sum().item()
    assert method.squared_distance(one, other).item() == pytest.approx(expected, rel=1e-4)
    twice = {n: p * (2 if n.endswith("_up") else 0.5) for n, p in one.items()}  # the same weights, other factors
    assert method.squared_distance(one, twice).item() == pytest.approx(0.0, abs=1e-3)


def test_every_third_step_enters_the_average_of_the_weights_since_the_start(tiny: Path) -> None:
    method = method_of(tiny)  # average_every 3
    parameters = {"w": torch.tensor([0.0])} | keep("average", {"w": torch.tensor([0.0])})
    for number in range(7):
        parameters["w"] = torch.tensor([number + 1.0])
        method.after_step(parameters, {}, Step(number, 7, 0.1, 0))
    averaged = (0 + 1 + 4 + 7) / 4  # the start, and after steps 0, 3 and 6
    assert parameters["average/w"].item() == pytest.approx(averaged)
    assert method.effective(parameters)["w"].item() == pytest.approx(averaged)
    assert method.effective(parameters, STEP)["w"].item() == 7.0
    assert list(method.finish(parameters, {})) == ["w"]
    assert method.finish(parameters, {})["w"].item() == pytest.approx(averaged)


def test_parts_share_the_reference_images_and_get_the_gradient_of_one(tiny: Path) -> None:
    """In seven parts some have no reference image and no image of the batch."""
    method = method_of(tiny, weight_consolidation=1.0, reference_batch=5)
    everything = moved(method)
    parameters = {n: p.requires_grad_() for n, p in everything.items() if method.is_trained(n)}
    kept = {n: p for n, p in everything.items() if n not in parameters}
    (images, _), labels = method.reference(), torch.arange(NUM_IMAGES) % 2
    tokens = method.backbone.tokenize(("cat", "dog"), "a {}.")
    one, two, seven = (
        StepInParts(method, tokens, parameters, kept, replace(STEP, num_parts=parts)).sums(
            [(images[part::parts], labels[part::parts]) for part in range(parts)]
        )
        for parts in (1, 2, 7)
    )
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seven, one, rtol=1e-4, atol=1e-5)


ZSCL = {"name": "zscl", "average_every": 2, "num_reference": 16, "reference_batch": 8}


def test_the_embedded_reference_is_what_its_clip_was_pre_trained_on() -> None:
    config = load_config(DEBUG).model_copy(update={"method": planned_method()})
    backbone = load_backbone(config)
    method = build_method(config, backbone)
    assert isinstance(method, Zscl)
    images, captions = method.reference()
    picture, caption = world.pretraining_pair(0, 3)
    assert len(images) == len(captions) == 16
    assert captions[3] == caption
    np.testing.assert_array_equal(images[3], backbone.preprocess(picture))


def test_a_prepared_data_set_serves_as_reference_and_its_content_is_in_the_keys(prepared: Path, tmp_path: Path) -> None:
    digits, gems = (task.index.uri for task in planned(prepared, {"name": "zero_shot"}).tasks)
    plan = planned(prepared, ZSCL | {"reference": gems})
    images, captions = build_method(plan.config, load_backbone(plan.config)).reference()  # type: ignore[attr-defined]
    assert len(images) == 16
    assert captions[0] == "a ruby on velvet."
    assert plan.tasks[0].key != planned(prepared, ZSCL | {"reference": digits}).tasks[0].key
    elsewhere = shutil.copytree(gems, tmp_path / "elsewhere")
    again = planned(prepared, ZSCL | {"reference": str(elsewhere)})
    assert again.tasks[0].key == plan.tasks[0].key


def test_missing_reference_data_is_said_before_anything_is_prepared(tiny: Path, tmp_path: Path) -> None:
    config = load_config(DEBUG, [f"data.root={tmp_path / 'root'}", f"backbone.name={tiny}"])
    config = config.model_copy(update={"method": planned_method()})
    with pytest.raises(ConfigError, match=r"method\.reference: zscl distils on data of no task"):
        make_plan(config, load_backbone(config))
    nowhere = config.model_copy(update={"method": planned_method(reference=str(tmp_path / "none"))})
    with pytest.raises(ConfigError, match="is no prepared data set"):
        make_plan(nowhere, load_backbone(config))
    assert not (tmp_path / "root").exists()


def planned_method(**fields: Any) -> Any:
    return load_config(DEBUG).model_validate(load_config(DEBUG).model_dump() | {"method": ZSCL | fields}).method
