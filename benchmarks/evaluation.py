"""Evaluation: a batch against the port's, and what each idea brings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import interleaved
from benchmarks.world import TEMPLATE, Port, World, all_tokens_in_the_last_block
from diki_ray.answering.class_features import Candidates, ClassFeatures, Exact, Tabulated
from diki_ray.answering.gaussians import Gaussians
from diki_ray.answering.predictor import Predictor
from diki_ray.answering.routing import GaussianRouter, Published, Routes, Routing
from diki_ray.learning.module import TaskModule

Row = dict[str, Any]


def make_predictor(world: World, modules: list[TaskModule], class_features: ClassFeatures | None = None) -> Predictor:
    gaussians = Gaussians([m.moments for m in modules], shrinkage="oas")
    router = GaussianRouter(gaussians, Published(float(world.backbone.embed_dim)))
    return Predictor(world.method, modules, router, class_features or Tabulated(33))


class Answering:
    """A test batch with one task learnt, answered by the platform and by the port."""

    def __init__(self, world: World, num_classes: int, batch: int):
        self.world, self.images = world, world.images(batch)
        names = world.names(num_classes)
        modules = [world.module(0, names, self.images)]
        self.predictor, self.exact = make_predictor(world, modules), make_predictor(world, modules, Exact())
        self.candidates, self.tokens = Candidates.of(world.backbone, names, [TEMPLATE]), world.tokens(num_classes)
        self.port = Port(world)

    def ours(self, routing: Routing = "image", kept: Tensor | None = None) -> Tensor:
        """The answers [B]; kept: the frozen features, where they are known."""
        predictor = self.predictor if routing == "image" else self.exact  # as `build_class_features` chooses
        frozen = predictor.frozen_features(self.images) if kept is None else kept
        routes = predictor.routes(predictor.scores(frozen), routing)
        return predictor.logits(self.images, frozen, routes, self.candidates).argmax(1)

    def ports(self) -> Tensor:
        return self.port.evaluate_batch(self.images, self.predictor, self.tokens, 1)

    def check(self) -> None:
        """Raises AssertionError where the two answer differently."""
        same = (self.ours("batch") == self.ports()).float().mean().item()
        if same < (1.0 if self.world.device == "cpu" else 0.98):
            raise AssertionError(f"the port and the platform answer differently: {same:.3f} the same")


def evaluation(world: World, num_classes: int, batch: int, rounds: int) -> Row:
    """One test batch against the port, which is checked to give the same answers; class tables are made before."""
    answering = Answering(world, num_classes, batch)
    answering.check()
    kept = answering.predictor.frozen_features(answering.images)
    seconds = interleaved(
        world.device, rounds, first=answering.ours, again=lambda: answering.ours(kept=kept), port=answering.ports
    )
    return {
        "classes": num_classes,
        "batch": batch,
        "images_per_s": batch / seconds["first"],
        "images_per_s_features_kept": batch / seconds["again"],
        "port_images_per_s": batch / seconds["port"],
        "ratio": seconds["port"] / seconds["first"],
        "ratio_features_kept": seconds["port"] / seconds["again"],
    }


def ablation(world: World, num_classes: int, batch: int, rounds: int, num_tasks: int = 4) -> list[Row]:
    """What answering a mixed batch costs with one optimisation taken away, against answering it as it is."""
    images, names = world.images(batch), world.names(num_classes)
    modules = [world.module(t, names, images) for t in range(num_tasks)]
    tabulated, exact, skipping = (make_predictor(world, modules, c) for c in (Tabulated(33), Exact(), Tabulated(33)))
    candidates = Candidates.of(world.backbone, names, [TEMPLATE])
    task = torch.arange(batch) % num_tasks
    weight = torch.linspace(0.0, 1.0, batch, dtype=torch.float64)
    skipping.skip_weight = 0.5
    frozen, routes = tabulated.frozen_features(images), Routes(task, weight, weight)

    def from_the_start() -> None:
        tabulated.logits(images, tabulated.frozen_features(images), routes, candidates)

    def task_by_task() -> None:
        for t in range(num_tasks):
            rows = task == t
            part = Routes(task[rows], weight[rows], weight[rows])
            tabulated.logits(images[rows], frozen[rows], part, candidates)

    def with_all_of_the_last_block() -> None:
        with all_tokens_in_the_last_block(world.backbone):
            tabulated.logits(images, frozen, routes, candidates)

    seconds = interleaved(
        world.device,
        rounds,
        as_it_is=lambda: tabulated.logits(images, frozen, routes, candidates),
        features_kept=from_the_start,
        mixed_batches=task_by_task,
        last_block_for_one_token=with_all_of_the_last_block,
        skipping=lambda: skipping.logits(images, frozen, routes, candidates),
    )
    exact_s = interleaved(world.device, 1, exact=lambda: exact.logits(images, frozen, routes, candidates))["exact"]
    whole, skipped = seconds.pop("as_it_is"), seconds.pop("skipping")
    rows = [{"optimisation": n, "of": "answering a batch", "without_it": s / whole} for n, s in seconds.items()]
    rows.append({"optimisation": "class_tables", "of": "answering a batch", "without_it": exact_s / whole})
    rows.append({"optimisation": "skip_weight_half", "of": "answering a batch", "without_it": whole / skipped})
    return rows
