"""Evaluation: a batch, and the whole accuracy matrix of a stream, against the port; what each idea brings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diki_ray.benchmark.timing import interleaved
from diki_ray.benchmark.world import TEMPLATE, Port, World
from diki_ray.model.answers import Answers, answer, needed_routes
from diki_ray.model.gaussian import Gaussians
from diki_ray.model.module import TaskModule
from diki_ray.model.predictor import Candidates, Predictor
from diki_ray.model.routing import Published, Routes

Row = dict[str, Any]


def make_predictor(world: World, modules: list[TaskModule], text_grid: int = 33) -> Predictor:
    gaussians = Gaussians([m.moments for m in modules], shrinkage="oas")
    return Predictor(world.method, modules, gaussians, Published(float(world.backbone.embed_dim)), text_grid)


def evaluation(world: World, num_classes: int, batch: int, rounds: int) -> Row:
    """One test batch with one task learnt, class tables made, against the port; the same answers, checked first.

    Raises:
        AssertionError: they answer differently.
    """
    images, names = world.images(batch), world.names(num_classes)
    predictor = make_predictor(world, [world.module(0, names, images)])
    candidates, tokens = Candidates.of(world.backbone, names, [TEMPLATE]), world.tokens(num_classes)
    port = Port(world)

    def ours(routing: Any = "image", kept: Tensor | None = None) -> Tensor:
        frozen = predictor.frozen_features(images) if kept is None else kept
        routes = predictor.route(predictor.log_density(frozen), routing)
        return predictor.logits(images, frozen, routes, candidates).argmax(1)

    same = (ours("batch") == port.evaluate_batch(images, predictor, tokens, 1)).float().mean().item()
    if same < (1.0 if world.device == "cpu" else 0.98):
        raise AssertionError(f"the port and the platform answer differently: {same:.3f} the same")
    kept = predictor.frozen_features(images)
    seconds = interleaved(
        world.device,
        rounds,
        first=ours,
        again=lambda: ours(kept=kept),
        port=lambda: port.evaluate_batch(images, predictor, tokens, 1),
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
    tabulated, exact, skipping = (make_predictor(world, modules, grid) for grid in (33, 0, 33))
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

    seconds = interleaved(
        world.device,
        rounds,
        as_it_is=lambda: tabulated.logits(images, frozen, routes, candidates),
        features_kept=from_the_start,
        mixed_batches=task_by_task,
        skipping=lambda: skipping.logits(images, frozen, routes, candidates),
    )
    exact_s = interleaved(world.device, 1, exact=lambda: exact.logits(images, frozen, routes, candidates))["exact"]
    whole, skipped = seconds.pop("as_it_is"), seconds.pop("skipping")
    rows = [{"optimisation": n, "of": "answering a batch", "without_it": s / whole} for n, s in seconds.items()]
    rows.append({"optimisation": "class_tables", "of": "answering a batch", "without_it": exact_s / whole})
    rows.append({"optimisation": "skip_weight_half", "of": "answering a batch", "without_it": whole / skipped})
    return rows


def stream(world: World, num_tasks: int, num_classes: int, images_per_task: int, rounds: int) -> Row:
    """The whole accuracy matrix, and the last task's addition to it: answers kept, against each cell afresh.

    Each task's images are noise about a picture of its own, so that routing has something to tell apart.
    """
    modules, candidates, tokens, tests = [], [], [], []
    for t in range(num_tasks):
        domain = 2 * world.images(1, seed=500 + t)
        names = [f"{name} {t}" for name in world.names(num_classes)]
        modules.append(world.module(t, names, domain + world.images(96, seed=100 + t)))
        candidates.append(Candidates.of(world.backbone, names, [TEMPLATE]))
        tokens.append(world.backbone.tokenize(names, TEMPLATE))
        tests.append(domain + world.images(images_per_task, seed=900 + t))
    port, gaussians = Port(world), Gaussians([m.moments for m in modules], shrinkage="oas")

    def make() -> Predictor:
        return Predictor(world.method, modules, gaussians, Published(float(world.backbone.embed_dim)), text_grid=33)

    def answered(predictor: Predictor, j: int, known: tuple[Tensor, Answers] | None, learnt: int) -> Answers:
        features = predictor.frozen_features(tests[j]) if known is None else known[0]
        answers = Answers.empty(np.zeros(len(features)), num_tasks, 1) if known is None else known[1]
        densities = predictor.log_density(features)
        answers.log_density[:] = densities.numpy()
        for t in range(num_tasks):
            column = torch.full((len(features),), t)
            answers.weight[:, t] = predictor.calibration.weight(densities[:, t], column).numpy()
        needed = needed_routes(answers.log_density, [range(learnt)])
        answer(predictor, tests[j], features, answers, [candidates[j]], needed)
        return answers

    def once() -> None:
        predictor = make()
        for j in range(num_tasks):
            answered(predictor, j, None, num_tasks)

    def afresh() -> None:
        predictor = make()
        for learnt in range(1, num_tasks + 1):
            for j in range(num_tasks):
                port.evaluate_batch(tests[j], predictor, tokens[j], learnt)

    before = make()
    features = [before.frozen_features(images) for images in tests[:-1]]
    kept = [answered(before, j, None, num_tasks - 1) for j in range(num_tasks - 1)]

    def last_added() -> None:
        predictor = make()
        for j in range(num_tasks - 1):
            answered(predictor, j, (features[j], kept[j].rows(slice(None))), num_tasks)
        answered(predictor, num_tasks - 1, None, num_tasks)

    def last_afresh() -> None:
        predictor = make()
        for j in range(num_tasks):
            port.evaluate_batch(tests[j], predictor, tokens[j], num_tasks)
        for learnt in range(1, num_tasks):
            port.evaluate_batch(tests[-1], predictor, tokens[-1], learnt)

    seconds = interleaved(world.device, rounds, ours=once, port=afresh, last_added=last_added, last_afresh=last_afresh)
    return {
        "tasks": num_tasks,
        "classes": num_classes,
        "images_per_task": images_per_task,
        "matrix_s": seconds["ours"],
        "port_matrix_s": seconds["port"],
        "ratio": seconds["port"] / seconds["ours"],
        "last_task_added_s": seconds["last_added"],
        "ratio_last_task_added": seconds["last_afresh"] / seconds["last_added"],
    }
