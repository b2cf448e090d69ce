"""The whole accuracy matrix of a stream: answers kept and indexed, against evaluating each cell afresh."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.evaluation import Row, make_predictor
from benchmarks.timing import interleaved
from benchmarks.world import TEMPLATE, Port, World
from diki_ray.answering.answers import Answers, needed_rows
from diki_ray.answering.class_features import Candidates
from diki_ray.answering.predictor import Predictor
from diki_ray.answering.routing import NO_TASK
from diki_ray.answering.rows import Rows, Wanted, best_classes, computed_rows
from diki_ray.answering.split_routes import SplitRouter


class Stream:
    """Learnt tasks with test batches each: noise about a picture of its own, so that routing has something to tell
    apart."""

    def __init__(self, world: World, num_tasks: int, num_classes: int, batch: int, num_batches: int):
        self.world, self.port, self.num_tasks = world, Port(world), num_tasks
        domains = [2 * world.images(1, seed=500 + t) for t in range(num_tasks)]
        names = [[f"{name} {t}" for name in world.names(num_classes)] for t in range(num_tasks)]
        self.modules = [
            world.module(t, names[t], domain + world.images(96, seed=100 + t)) for t, domain in enumerate(domains)
        ]
        self.candidates = [Candidates.of(world.backbone, own, [TEMPLATE]) for own in names]
        self.tokens = [world.backbone.tokenize(own, TEMPLATE) for own in names]
        noise = [world.images(batch * num_batches, seed=900 + t).split(batch) for t in range(num_tasks)]
        self.tests = [(j, domain + images) for j, domain in enumerate(domains) for images in noise[j]]

    def answered(
        self, predictor: Predictor, j: int, images: Tensor, learnt: int, known: Answers | None = None
    ) -> Answers:
        """All that the cells of test set j need of a batch once `learnt` tasks are learnt."""
        sample = np.arange(len(images))
        frozen = predictor.frozen_features(images) if known is None else torch.from_numpy(known.frozen)
        zero = np.zeros(len(images))
        rows = {NO_TASK: Rows(Wanted(sample, zero, zero), frozen.numpy())} if known is None else dict(known.rows)
        new = {NO_TASK: rows[NO_TASK]} if known is None else {}
        routes = SplitRouter(predictor.router, "routed", "image").routes(frozen, [len(images)])
        for task, wanted in needed_rows(sample, routes, [range(n) for n in range(learnt + 1)]).items():
            if task in rows:
                wanted = wanted.take(np.flatnonzero(rows[task].find(wanted) < 0))
            if len(wanted.sample):
                new[task] = computed_rows(predictor, task, images, sample, wanted, len(images))
        for task, found in new.items():
            best = best_classes(predictor, task, found.feature, found.wanted.text_weight, self.candidates[j])
            scored = replace(found, scores={"own": best})
            rows[task] = Rows.joined([rows[task], scored]) if task in rows and task != NO_TASK else scored
        return Answers(("",) * len(images), sample, sample, {}, rows)

    def matrix(self) -> None:
        predictor = make_predictor(self.world, self.modules)
        for j, images in self.tests:
            self.answered(predictor, j, images, self.num_tasks)

    def port_cells(self, cells: list[tuple[int, int]]) -> None:
        """Cells (tasks learnt, test set), each afresh."""
        predictor = make_predictor(self.world, self.modules)
        for learnt, cell in cells:
            for j, images in self.tests:
                if j == cell:
                    self.port.evaluate_batch(images, predictor, self.tokens[j], learnt)

    def known_before_the_last(self) -> list[Answers]:
        """Of the test sets that there were before the last task."""
        predictor, last = make_predictor(self.world, self.modules), self.num_tasks - 1
        return [self.answered(predictor, j, images, last) for j, images in self.tests if j < last]

    def last_added(self, known: list[Answers]) -> None:
        """What the matrix needs more when the last task has been learnt."""
        predictor = make_predictor(self.world, self.modules)
        for (j, images), before in itertools.zip_longest(self.tests, known):
            self.answered(predictor, j, images, self.num_tasks, before)


def matrix(world: World, num_tasks: int, num_classes: int, batch: int, num_batches: int, rounds: int) -> Row:
    """Wall time of the whole matrix, class tables and all, and of what the last task adds to it, against the port."""
    stream = Stream(world, num_tasks, num_classes, batch, num_batches)
    known, numbers = stream.known_before_the_last(), range(num_tasks)
    cells = [(learnt + 1, j) for learnt in numbers for j in numbers]
    last = [(learnt, j) for learnt, j in cells if learnt == num_tasks or j == num_tasks - 1]
    seconds = interleaved(
        world.device,
        rounds,
        ours=stream.matrix,
        port=lambda: stream.port_cells(cells),
        last_added=lambda: stream.last_added(known),
        last_afresh=lambda: stream.port_cells(last),
    )
    return {
        "tasks": num_tasks,
        "classes": num_classes,
        "images_per_task": batch * num_batches,
        "batch": batch,
        "matrix_s": seconds["ours"],
        "port_matrix_s": seconds["port"],
        "ratio": seconds["port"] / seconds["ours"],
        "last_task_added_s": seconds["last_added"],
        "ratio_last_task_added": seconds["last_afresh"] / seconds["last_added"],
    }
