"""BLIP: which bits of a weight a task freezes, and what the next task may still do to it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tiny_backbone import write_tiny_backbone
from torch.nn import functional as F

from diki_ray.clip.backbone import load
from diki_ray.clip.residual import Parameters
from diki_ray.config.methods import SequentialLoraSection
from diki_ray.learning.methods import SequentialLora, Step, TrainingBatch
from diki_ray.learning.methods.blip import Blip, rounded
from diki_ray.learning.methods.fisher import squared_gradients
from diki_ray.learning.methods.low_rank import kept, trained

STEP = Step(0, 10, 0.1, 7)
B = 6 / math.sqrt(4)  # of a factor of rank 4


def during(blip: Blip, up: float = 0.0, predecessor: Parameters | None = None) -> Parameters:
    """One pair of factors at the start of a task; B has four weights, in one row."""
    start = {"q_down": torch.tensor([[0.5], [0.5], [0.5], [0.5]]), "q_up": torch.full((1, 4), up)}
    return blip.begun(start if predecessor is None else trained(predecessor), predecessor)


def test_a_weight_without_frozen_bits_moves_anywhere_within_the_bound_and_one_with_three_an_eighth_of_it() -> None:
    blip = Blip(1e-4)
    parameters = during(blip, up=1.0)
    parameters["bits/q_up"] = torch.tensor([[0.0, 3.0, 3.0, 20.0]])
    parameters["q_up"] = torch.tensor([[9.0, 9.0, 1.2, -9.0]])
    blip.after_step(parameters, {}, STEP)
    expected = [B * (1 - 2**-20), 1 + B / 8, 1.2, 1 - B / 2**20]
    torch.testing.assert_close(parameters["q_up"], torch.tensor([expected]))


def test_a_weight_is_rounded_to_its_frozen_bits_and_to_zero_where_it_has_none() -> None:
    found = rounded(torch.tensor([[0.4 * B, 0.4 * B, 0.4 * B, -0.9 * B]]), torch.tensor([[0.0, 1.0, 3.0, 2.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5 * B, 0.375 * B, -1.0 * B]]))


def test_bits_grow_by_what_the_fisher_information_gains() -> None:
    blip = Blip(0.01)  # so F_old is 0.04 at first
    first = during(blip)
    first["q_up"] = torch.tensor([[0.4 * B, 0.4 * B, 0.4 * B, 0.4 * B]])
    information = torch.tensor([[0.0, 0.04, 0.05, 2.0]], dtype=torch.float64)
    sums = {"squares/q_up": information * 8, "count/images": torch.tensor(8)}
    module = blip.finish(first, sums)
    # ½ log₂ of (0 + 0.04)/0.08, (0.04 + 0.04)/0.08, (0.05 + 0.04)/0.08, (2 + 0.04)/0.08
    assert module["bits/q_up"].tolist() == [[0, 0, 1, math.ceil(0.5 * math.log2(25.5))]]
    torch.testing.assert_close(module["fisher/q_up"], torch.tensor([[0.02, 0.04, 0.045, 1.02]]))
    torch.testing.assert_close(module["q_up"], torch.tensor([[0.0, 0.0, 0.5 * B, 0.375 * B]]))

    second = during(blip, predecessor=module)
    sums = {"squares/q_up": torch.tensor([[0.5, 0.0, 0.0, 60.0]], dtype=torch.float64), "count/images": torch.tensor(1)}
    again = blip.finish(second, sums)
    # now (F + 2 F_old) / (3 F_old): 0.54/0.06, less than 1, less than 1, 62.04/3.06
    assert again["bits/q_up"].tolist() == [[2, 0, 1, 3 + math.ceil(0.5 * math.log2(62.04 / 3.06))]]
    assert again["count/tasks"].item() == 2


def test_no_more_than_twenty_bits_are_frozen() -> None:
    blip = Blip(1e-30)
    sums = {"squares/q_up": torch.ones(1, 4, dtype=torch.float64), "count/images": torch.tensor(1)}
    assert blip.finish(during(blip), sums)["bits/q_up"].max().item() == 20


def test_the_smallest_prior_that_is_allowed_gives_finite_weights() -> None:
    smallest = {"name": "sequential_lora", "against_forgetting": "blip", "blip_prior": 1e-20}
    with pytest.raises(ValidationError, match="blip_prior"):
        SequentialLoraSection.model_validate(smallest | {"blip_prior": 9e-21})
    blip = Blip(SequentialLoraSection.model_validate(smallest).blip_prior)
    tasks = [{"squares/q_up": torch.full((1, 4), s).double(), "count/images": torch.tensor(1)} for s in (0, 1e6, 0)]
    module = blip.finish(during(blip, up=0.5), tasks[0])
    for sums in tasks[1:]:
        assert all(p.isfinite().all() for p in module.values())
        module = blip.finish(during(blip, predecessor=module), sums)
    assert all(p.isfinite().all() for p in module.values())


def test_the_random_factors_are_not_trained_and_pass_from_task_to_task_as_they_are(tmp_path: Path) -> None:
    settings = {"rank": 2, "alpha": 1.0, "image_depth": 1, "text_depth": 1, "wise_ft": 1.0, "ewc_lambda": 1.0}
    backbone = load(str(write_tiny_backbone(tmp_path)))
    method = SequentialLora(backbone, against_forgetting="blip", badam_std=0.1, blip_prior=1e-4, **settings)
    first = method.initial(torch.Generator().manual_seed(0))
    assert all(name.endswith("_up") for name in first if method.is_trained(name))
    module = method.finish(first, {"count/images": torch.tensor(1)})
    second = method.initial(torch.Generator().manual_seed(1), module)
    downs = {n: p for n, p in method.effective(second).items() if n.endswith("_down")}
    plain = SequentialLora(backbone, against_forgetting="none", badam_std=0.1, blip_prior=1e-4, **settings)
    start = plain.initial(torch.Generator().manual_seed(0))
    assert downs
    assert all(torch.equal(p, start[n]) for n, p in downs.items())
    assert set(method.effective(second)) == set(start)


def test_the_labels_of_the_fisher_information_are_drawn_from_the_model(tmp_path: Path) -> None:
    """Over many draws as often as the model says, whatever label the image has."""
    backbone = load(str(write_tiny_backbone(tmp_path)))
    settings = {"rank": 2, "alpha": 1.0, "image_depth": 1, "text_depth": 1, "wise_ft": 1.0, "ewc_lambda": 1.0}
    method = SequentialLora(backbone, against_forgetting="blip", badam_std=0.1, blip_prior=1e-4, **settings)
    parameters = method.initial(torch.Generator().manual_seed(0))
    ups, fixed = trained(parameters), kept("fixed", parameters)
    image, tokens = torch.rand(1, 3, 32, 32), backbone.tokenize(["cat", "dog"], "a {}.")
    logits = backbone.logits(method.image_features(image, ups | fixed), method.text_features(tokens, ups | fixed))

    def batch(label: int, seed: int) -> TrainingBatch:
        return TrainingBatch(image, torch.tensor([label]), torch.zeros(1, 32), tokens, seed)

    name = "image.layer0.v_up"
    of_label = [squared_gradients(method, ups, fixed, batch(label, 0))[name] for label in (0, 1)]
    assert not torch.allclose(of_label[0], of_label[1])
    drawn = [method.sums(parameters, batch(0, seed))[f"squares/{name}"] for seed in range(200)]
    num_first = sum(torch.equal(square, of_label[0]) for square in drawn)
    assert num_first + sum(torch.equal(square, of_label[1]) for square in drawn) == 200
    share = F.softmax(logits, 1)[0, 0].item()
    assert num_first / 200 == pytest.approx(share, abs=0.12)
    again = method.sums(parameters, batch(0, 3))[f"squares/{name}"]
    assert torch.equal(again, drawn[3])
