"""What a setting costs, beside what it reaches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from diki_ray.answering.answers import candidate_tasks
from diki_ray.answering.configured import build_predictor
from diki_ray.answering.predictor import Candidates
from diki_ray.data.stream import eval_batches
from diki_ray.data.to_device import on_device
from diki_ray.learning.methods import METHODS
from diki_ray.learning.module import TaskModule
from diki_ray.runs.plan import Plan, build_method, device_of, load_backbone, precision_of
from diki_ray.store.library import Library

MAX_IMAGES, REPETITIONS = 32, 3
"""So many images of each task are passed so often, and the last pass counts."""


class Stream(NamedTuple):
    """A plan and the digests of its modules."""

    plan: Plan
    digests: Sequence[str]


def cost_of(streams: Sequence[Stream], evaluate_s: float, split: str) -> dict[str, Any]:
    """Means over a setting's streams (a seed's, and an order's where modules depend on it); the largest peak memory.

    Training is what was measured when a module was trained, by whichever setting; None where that is not known.
    evaluate_s: seconds for one order, without what earlier evaluations had computed already.
    """
    library = Library.open(streams[0].plan.config.run.storage)
    plan, digests = streams[-1]
    blobs = [library.read(digest) for digest in digests]
    is_trained = METHODS[plan.config.method.name].is_trained
    sizes = [
        sum(p.size for name, p in TaskModule.from_bytes(blob).parameters.items() if is_trained(name)) for blob in blobs
    ]
    records = [library.find(task.key) for stream in streams for task in stream.plan.tasks]
    trained = [r.metadata.get("cost") if r is not None else None for r in records]
    known = [c for c in trained if c is not None] if all(trained) else []
    return {
        "num_parameters": round(sum(sizes) / len(sizes)),
        "num_bytes": sum(len(blob) for blob in blobs),
        "train_s": round(sum(c["seconds"] for c in known) / len(streams), 2) if known else None,
        "train_cpu_s": round(sum(c["cpu_seconds"] for c in known) / len(streams), 2) if known else None,
        "peak_mb": round(max(c["peak_bytes"] for c in known) / 1e6) if known else None,
        "evaluate_s": round(evaluate_s, 2),
        "images_per_s": round(images_per_s(streams[-1], split), 1),
    }


def images_per_s(stream: Stream, split: str) -> float:
    """Images that one process answers in a second once all tasks are learnt, from pixels: frozen pass, route, residual
    pass, logits. Batches of one task each; the best of a few passes, after one in which tables of class features were
    filled."""
    plan, digests = stream
    library = Library.open(plan.config.run.storage)
    torch.set_num_threads(max(1, int(plan.config.evaluate.cpus_per_worker)))
    backbone = load_backbone(plan.config).to(device_of(plan.config), precision_of(plan.config))
    modules = [TaskModule.from_bytes(library.read(digest)) for digest in digests]
    predictor, num_tasks = build_predictor(plan.config, build_method(plan.config, backbone), modules), len(plan.tasks)
    of_tasks = [Candidates.of(backbone, t.class_names, t.templates) for t in plan.tasks]
    batches = []
    for j, task in enumerate(plan.tasks):
        first = eval_batches(
            task.index,
            split,
            batch_size=MAX_IMAGES,
            transform=predictor.backbone.preprocess,
            batches=[0],
            num_threads=plan.config.data.num_threads,
        )
        among = candidate_tasks(plan.config.evaluate.label_space, j, range(num_tasks), num_tasks)
        candidates = [of_tasks[t] for t in among]
        batches += [(batch.images, candidates) for batch in on_device(first, predictor.backbone.device)]
    taken = []
    for _ in range(REPETITIONS):
        started = time.monotonic()
        for images, candidates in batches:
            frozen = predictor.frozen_features(images)
            routes = predictor.routes(predictor.scores(frozen), plan.config.evaluate.routing)
            features = predictor.image_features(images, frozen, routes)
            predictor.answer_logits(features, frozen, routes, candidates)
        taken.append(time.monotonic() - started)
    return sum(len(images) for images, _ in batches) / float(np.min(taken))
