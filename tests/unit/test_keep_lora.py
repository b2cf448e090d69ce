"""KeepLoRA: in which directions a task may change a projection, and which are protected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbone import write_tiny_backbone
from torch.nn import functional as F

from diki_ray.clip.backbone import Backbone, load
from diki_ray.clip.residual import Parameters
from diki_ray.errors import ConfigError
from diki_ray.learning.methods import KeepLora, TrainingBatch
from diki_ray.learning.methods.keep_lora import free_directions, leading, span, with_leading


@pytest.fixture
def backbone(tmp_path: Path) -> Backbone:
    return load(str(write_tiny_backbone(tmp_path)))


def method_of(backbone: Backbone, **settings: Any) -> KeepLora:
    values: dict[str, Any] = {"rank": 2, "alpha": 2.0, "image_depth": 1, "text_depth": 1}
    shares = {"image_energy": 0.5, "text_energy": 0.2, "input_energy": 0.9}
    return KeepLora(backbone, **(values | shares | settings))


def batch_of(backbone: Backbone) -> TrainingBatch:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    tokens = backbone.tokenize(["cat", "dog", "owl"], "a {}.")
    return TrainingBatch(images, torch.tensor([0, 1, 2, 1]), torch.zeros(4, 32), tokens)


def summed(method: KeepLora, parameters: Parameters, batch: TrainingBatch) -> Parameters:
    return {name: s.double() for name, s in method.first_sums(parameters, batch).items()}


def gradient_of_weights(backbone: Backbone, batch: TrainingBatch) -> dict[str, torch.Tensor]:
    """Of the loss, by the weights themselves of the first block of each tower, each [D, D'] for x from the left."""
    model: Any = backbone.model
    blocks = {"image": model.visual.transformer.resblocks[0].attn, "text": model.transformer.resblocks[0].attn}
    weights = [w for attn in blocks.values() for w in (attn.in_proj_weight, attn.out_proj.weight)]
    for weight in weights:
        weight.requires_grad_()
    logits = backbone.logits(backbone.encode_image(batch.images), backbone.encode_text(batch.class_tokens))
    gradients = torch.autograd.grad(F.cross_entropy(logits, batch.labels, reduction="sum"), weights)
    found = {}
    for number, tower in enumerate(blocks):
        stacked, out = gradients[2 * number], gradients[2 * number + 1]
        found |= {f"{tower}.{part}": g.T for part, g in zip("qkv", stacked.chunk(3), strict=True)}
        found[f"{tower}.out"] = out.T
    return found


def test_the_first_gradient_is_that_of_the_projections_weights(backbone: Backbone) -> None:
    method, batch = method_of(backbone), batch_of(backbone)
    parameters = method.initial(torch.Generator().manual_seed(0))
    found = method.first_sums(parameters, batch)
    expected = gradient_of_weights(backbone, batch)
    assert len(found) == len(expected) == 8
    for name, gradient in expected.items():
        tower, part = name.split(".")
        probe = found[f"{tower}.layer0.{part}_probe"]
        assert gradient.norm() > 1e-3
        torch.testing.assert_close(probe, gradient, rtol=1e-3, atol=1e-5 + 1e-4 * float(gradient.norm()))


def test_leading_directions_are_the_fewest_that_hold_the_share() -> None:
    gram = torch.diag(torch.tensor([1.0, 6.0, 3.0])).double()
    assert leading(gram, 0.0).shape == (3, 0)
    assert leading(gram, 0.6).abs().tolist() == [[0.0], [1.0], [0.0]]
    assert leading(gram, 0.61).shape == (3, 2)
    assert leading(gram, 0.91).shape == (3, 3)


def test_new_directions_are_added_until_all_hold_the_share_of_the_new_inputs() -> None:
    basis, gram = torch.eye(4)[:, :1], torch.diag(torch.tensor([5.0, 1.0, 3.0, 1.0])).double()
    assert torch.equal(with_leading(basis, gram, 0.5), basis)  # it holds half of them already
    grown = with_leading(basis, gram, 0.79)
    torch.testing.assert_close(grown.abs(), torch.eye(4)[:, [0, 2]])


def test_what_is_protected_twice_counts_once() -> None:
    one = torch.eye(4).double()[:, :2]
    assert span([one, one[:, 1:]]).shape == (4, 2)


def test_free_directions_by_hand() -> None:
    gradient = torch.zeros(3, 2).double()
    gradient[0, 0], gradient[1, 1], gradient[2, 0] = 9.0, 2.0, 1.0
    found = free_directions(gradient, torch.eye(3).double()[:, :1], rank=2)
    torch.testing.assert_close(found.abs(), torch.eye(3)[1:])  # the largest, 9, is protected; then 2, then 1
    none = free_directions(gradient, torch.eye(3).double(), rank=2)
    assert torch.equal(none, torch.zeros(2, 3))


def test_a_task_reads_no_direction_that_is_protected(backbone: Backbone) -> None:
    method, batch = method_of(backbone), batch_of(backbone)
    start = method.initial(torch.Generator().manual_seed(0))
    first = method.begin(start, summed(method, start, batch), batch.class_tokens)
    w_q = backbone.image.block(0).projections()[0].double()
    vectors, values, _ = torch.linalg.svd(w_q)
    num = int((values.square().cumsum(0) < 0.5 * values.square().sum()).sum()) + 1
    down = first["image.layer0.q_down"].double()
    torch.testing.assert_close(down @ down.T, torch.eye(2).double(), rtol=0, atol=1e-5)
    assert (down @ vectors[:, :num]).abs().max() < 1e-5
    assert (down @ vectors[:, num:]).norm() == pytest.approx(2**0.5, abs=1e-5)

    module = method.finish(first, {name: s.double() for name, s in method.sums(first, batch).items()})
    inputs = module["seen/image.layer0.k"]
    assert 0 < inputs.shape[1] < 32
    start = method.initial(torch.Generator().manual_seed(1), module)
    second = method.begin(start, summed(method, start, batch), batch.class_tokens)
    assert (second["image.layer0.q_down"] @ inputs).abs().max() < 1e-4


@pytest.mark.parametrize("shares", [{"image": 0.9, "text": 0.3}, {"image": 0.3, "text": 0.9}])
def test_each_tower_has_its_own_share_of_protected_energy(backbone: Backbone, shares: dict[str, float]) -> None:
    method = method_of(backbone, image_energy=shares["image"], text_energy=shares["text"])
    batch = batch_of(backbone)
    start = method.initial(torch.Generator().manual_seed(0))
    begun = method.begin(start, summed(method, start, batch), batch.class_tokens)
    for tower in backbone.towers:
        vectors, values, _ = torch.linalg.svd(tower.block(0).projections()[0].double())
        held = values.square().cumsum(0) / values.square().sum()
        num = int((held < shares[tower.name]).sum()) + 1
        along = (begun[f"{tower.name}.layer0.q_down"].double() @ vectors).square().sum(0)
        assert along[:num].max() < 1e-8
        if shares[tower.name] < 0.5:
            assert along[num : int((held < 0.9).sum()) + 1].sum() > 0.1  # what the other share would protect is read


def test_the_directions_of_a_task_are_not_trained(backbone: Backbone) -> None:
    method = method_of(backbone)
    first = method.initial(torch.Generator().manual_seed(0))
    second = method.initial(torch.Generator().manual_seed(1), first)
    assert "old/image.layer0.q_up" in second
    ups = [f"{tower}.layer0.{part}_up" for tower in ("image", "text") for part in ("q", "k", "v", "out")]
    assert sorted(filter(method.is_trained, second)) == sorted(ups)


def test_the_pairs_of_all_tasks_add_up(backbone: Backbone) -> None:
    method, batch = method_of(backbone), batch_of(backbone)
    generator = torch.Generator().manual_seed(1)
    first = {n: torch.randn(p.shape, generator=generator) * 0.3 for n, p in method.initial(generator).items()}
    second = method.initial(generator, first)
    with torch.no_grad():
        after_first = method.image_features(batch.images, method.effective(first))
        # a new pair is zero at first
        torch.testing.assert_close(method.image_features(batch.images, method.effective(second)), after_first)
        second["image.layer0.out_up"] += 0.3
        found = method.image_features(batch.images, method.effective(second))
        both = {n: torch.cat([first[n], second[n]], 0 if n.endswith("_down") else 1) for n in first}
        torch.testing.assert_close(found, method.image_features(batch.images, both))
        out = backbone.model.visual.transformer.resblocks[0].attn.out_proj.weight
        out += both["image.layer0.out_up"] @ both["image.layer0.out_down"]
        without = {n: p * 0 if ".out_" in n else p for n, p in both.items()}
        torch.testing.assert_close(found, method.image_features(batch.images, without), rtol=1e-4, atol=1e-5)


def test_a_rank_that_the_projections_do_not_have_is_refused(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match=r"method\.rank: .* choose at most"):
        method_of(backbone, rank=4096)
