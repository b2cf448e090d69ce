"""Routing and the class model among many synthetic tasks, beside the image tower's time for as many images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.synthetic import SyntheticMoments, synthetic_classes, synthetic_features, synthetic_images
from benchmarks.timing import interleaved, timed
from benchmarks.world import World
from diki_ray.answering.class_answers import ClassDensities
from diki_ray.answering.class_head import FACTOR_BYTES
from diki_ray.answering.class_model import ClassModel
from diki_ray.answering.coarse import CoarseGaussians
from diki_ray.answering.gaussians import Gaussians

REPEATED_BELOW_S = 2.0
"""Computing all densities of thousands of tasks takes long, and is measured once."""


def routing(world: World, num_tasks: int, batch: int, rounds: int, tower_s: float) -> dict[str, Any]:
    """tower_s: of the image tower for a batch, measured by `tower_seconds`."""
    embed_dim = world.backbone.embed_dim
    gaussians = Gaussians(SyntheticMoments(num_tasks, embed_dim)).to(world.device)
    made: list[CoarseGaussians] = []
    build_s = timed(world.device, lambda: made.append(CoarseGaussians(gaussians)))
    (coarse,) = made
    features = synthetic_features(gaussians, batch).to(world.device)
    exact: list[Tensor] = []
    exact_s = timed(world.device, lambda: exact.append(gaussians.log_density(features)))
    if exact_s < REPEATED_BELOW_S:
        exact_s = interleaved(world.device, rounds, exact=lambda: gaussians.log_density(features))["exact"]
    coarse_s = interleaved(world.device, rounds, coarse=lambda: coarse.log_density(features))["coarse"]
    routed = coarse.log_density(features)
    return {
        "tasks": num_tasks,
        "dimensions": embed_dim,
        "batch": batch,
        "exact_s": exact_s,
        "coarse_s": coarse_s,
        "exact_share_of_tower": exact_s / tower_s,
        "coarse_share_of_tower": coarse_s / tower_s,
        "same_route": float((exact[0].argmax(1) == routed.argmax(1)).double().mean()),
        "densities_computed": float((routed > -float("inf")).double().mean()),
        "packed_factors_mb": gaussians.num_bytes / 1e6,
        "directions_mb": coarse.projection.numel() * 8 / 1e6,
        "coarse_made_s": build_s,
    }


def tower_seconds(world: World, batch: int, rounds: int) -> float:
    """Of a frozen pass over a batch, without gradients; scaled from 4 images where a batch would take long."""
    measured = batch if world.model != "ViT-B-16" or world.device == "cuda" else min(batch, 4)
    images = world.images(measured)
    encode = world.backbone.encode_image  # weights need no gradients, so none is kept
    return interleaved(world.device, rounds, tower=lambda: encode(images))["tower"] * batch / measured


def class_model(
    world: World, num_tasks: int, batch: int, rounds: int, tower_s: float, num_classes: int = 20, shots: int = 16
) -> dict[str, Any]:
    """Routing, weighing and answering by the class model among tasks of 20 classes of 16 images, all of their classes
    candidates; tower_s: of the image tower for a batch, measured by `tower_seconds`."""
    source = SyntheticMoments(num_tasks, world.backbone.embed_dim)
    tasks = [synthetic_classes(source, t, num_classes, shots) for t in range(num_tasks)]
    made: list[ClassModel] = []
    build_s = timed("cpu", lambda: made.append(ClassModel(tasks, factor_bytes=FACTOR_BYTES)))
    (model,) = made
    others = model.without_task(0)
    add_s = interleaved("cpu", rounds, add=lambda: others.with_task(tasks[0]))["add"]
    names, model = [name for task in tasks for name in task.names], model.on(torch.device(world.device))
    features = synthetic_images(source, batch, num_classes)
    zero_shot = torch.randn(batch, len(names), generator=torch.Generator().manual_seed(0))

    def answer() -> None:
        densities = ClassDensities(model, features)
        densities.log_density()
        densities.weight()
        densities.logits(zero_shot, names)

    first_s = timed(world.device, answer)
    answer_s = interleaved(world.device, rounds, answer=answer)["answer"]
    return {
        "tasks": num_tasks,
        "classes": len(names),
        "dimensions": world.backbone.embed_dim,
        "batch": batch,
        "answer_s": answer_s,
        "first_answer_s": first_s,
        "share_of_tower": answer_s / tower_s,
        "added_s": add_s,
        "made_s": build_s,
        "class_means_mb": 2 * model.means.numel() * 8 / 1e6,
        "sums_mb": sum(t.statistics.second.nbytes + t.statistics.first.nbytes for t in tasks) / 1e6,
    }
