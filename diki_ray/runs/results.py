"""results.json and the table of a run: the matrix with its zero-shot row and chance, the metrics, provenance.

Nothing in it is a secret: the configuration has none, and the command is kept as it was typed.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from diki_ray.answering.answers import chances
from diki_ray.answering.evaluation import Evaluation
from diki_ray.answering.figures import routed_counts
from diki_ray.answering.metrics import Metrics, matrix_document, number
from diki_ray.config import Config, parse_stored
from diki_ray.config.places import absolute
from diki_ray.data.completeness import is_incomplete, shortcomings
from diki_ray.errors import ConfigError
from diki_ray.learning.methods import METHODS
from diki_ray.learning.module import TaskModule
from diki_ray.report.results import DOCUMENT, FORMAT
from diki_ray.runs.plan import Plan

NUM_BINS = 20
NUM_EXAMPLES = 8
VERSIONS = ("diki-ray", "torch", "open_clip_torch", "ray", "webdataset", "numpy")


def protocol_id(config: Config) -> str:
    """The protocol with the routing it was evaluated with, as in `mtil-1/coop/image`."""
    return f"{config.protocol}/{config.evaluate.routing}"


def protocol_of(plan: Plan) -> str:
    """The protocol's id; marked, as in `mtil-1/coop/image+incomplete`, where a data set lacks published images."""
    incomplete = plan.config.protocol != "own" and any(is_incomplete(task.index) for task in plan.tasks)
    return protocol_id(plan.config) + ("+incomplete" if incomplete else "")


def build_results(
    plan: Plan,
    modules: Sequence[TaskModule],
    digests: Sequence[str],
    evaluation: Evaluation,
    *,
    notes: dict[str, Any],
    seconds: dict[str, float],
    trained: Sequence[str],
    command: str,
) -> dict[str, Any]:
    """The document of a finished run, JSON values only; NaN (a metric that is not defined) is null."""
    config, accuracy = plan.config, evaluation.accuracy()
    return {
        "format": FORMAT,
        "run": config.run.name,
        "protocol": protocol_of(plan),
        "config_digest": config.digest(),
        "config": config.model_dump(mode="json"),
        "backbone": {"name": config.backbone.name, "digest": plan.backbone_digest, "embed_dim": plan.embed_dim},
        "command": command,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {name: version(name) for name in VERSIONS} | {"python": platform.python_version()},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "trained": list(trained),
        "notes": notes,
        "tasks": [
            _task(plan, evaluation, j, module, digest)
            for j, (module, digest) in enumerate(zip(modules, digests, strict=True))
        ],
        **matrix_document(evaluation.zero_shot(), accuracy, Metrics.of(accuracy)),
    }


def is_of_configuration(results: dict[str, Any], config: Config) -> bool:
    """Whether results were made under this configuration, as far as it decides the numbers.

    Asked of the configuration that is stored with them, not of its digest: what a digest is made of has changed.
    """
    try:
        return parse_stored(results["config"], source=DOCUMENT).digest() == config.digest()
    except ConfigError:
        return False  # a version wrote it whose settings are not these


def _task(plan: Plan, evaluation: Evaluation, j: int, module: TaskModule, digest: str) -> dict[str, Any]:
    planned, answers, stream = plan.tasks[j], evaluation.test_sets[j], range(len(plan.tasks))
    method = METHODS[plan.config.method.name]
    last = evaluation.routes[j](stream)
    return {
        "name": planned.name,
        "class_names": list(planned.class_names),
        "templates": list(planned.templates),
        "chance": chances(plan.config.evaluate.label_space, [len(t.class_names) for t in plan.tasks])[j],
        "data": {
            "uri": _as_configured(planned.index.uri, plan.config, j),
            "digest": planned.index.digest(),
            "protocol": planned.index.split_protocol,
            "sizes_that_differ": planned.index.provenance.get("sizes_that_differ", {}),
            "shortcomings": shortcomings(planned.index),
        },
        "module": {
            "key": planned.key,
            "digest": digest,
            "num_parameters": sum(p.size for name, p in module.parameters.items() if method.is_trained(name)),
            "num_bytes": len(module.to_bytes()),
            "parameters_of": module.provenance.get("parameters_of"),
        },
        "num_train": module.moments.count,
        "num_test": len(answers.labels),
        "num_skipped_train": module.provenance["num_skipped"],
        "skipped_test": answers.skipped,
        "best_epoch": module.provenance["best_epoch"],
        "history": module.provenance["history"],
        "routed": routed_counts(last.task, len(plan.tasks)),
        "weights": {
            # At the end, when the task is learnt; and before it is learnt, routed among the earlier ones.
            "learnt": _histogram(last.weight),
            "unlearnt": _histogram(evaluation.routes[j](stream[:j]).weight) if j else None,
        },
        "examples": _examples(plan, evaluation, j),
    }


def _as_configured(uri: str, config: Config, j: int) -> str:
    """The place of task j's prepared data as the configuration writes it: results are handed on, and in full a path
    says how the folders of this machine are called."""
    for written in (config.data.root, *(task.data for task in config.tasks[j : j + 1])):
        place = absolute(written)
        if uri == place or uri.startswith(place.rstrip("/") + "/"):
            return written.rstrip("/") + uri[len(place.rstrip("/")) :]
    return uri


def _examples(plan: Plan, evaluation: Evaluation, j: int) -> list[dict[str, Any]]:
    """Some test images with their answers at the end: as many wrong ones as there are, up to half."""
    answers, last = evaluation.test_sets[j], evaluation.predict(j, range(len(plan.tasks)))
    names = [t.class_names for t in plan.tasks]
    right = evaluation.correct(j, last)
    wrong_rows, right_rows = np.flatnonzero(~right)[: NUM_EXAMPLES // 2], np.flatnonzero(right)
    rows = np.concatenate([wrong_rows, right_rows[: NUM_EXAMPLES - len(wrong_rows)]])
    zero = evaluation.predict(j, ())
    return [
        {
            "sample": int(n),
            "key": answers.keys[n],
            "label": names[j][answers.labels[n]],
            "answer": names[last.block[n]][last.best[n]],
            "zero_shot_answer": names[zero.block[n]][zero.best[n]],
            "right": bool(right[n]),
            "confidence": round(float(last.confidence[n]), 4),
            "routed": plan.tasks[last.routed[n]].name if last.routed[n] >= 0 else None,
            "weight": round(float(last.weight[n]), 4),
        }
        for n in rows
    ]


def _histogram(weights: np.ndarray) -> dict[str, Any]:
    counts, _ = np.histogram(weights, bins=NUM_BINS, range=(0, 1))
    return {"mean": number(weights.mean()), "counts": [int(c) for c in counts]}
