"""Two evaluations on the same images: differences, and how far chance alone would move them.

Every metric is a mean over test sets of a mean over images of a score of each image (for Last whether it is right at
the end, for Average the share of the stream at which it is). So two runs are compared image by image, and the interval
is a paired bootstrap that draws images anew within each test set. It says what another draw of test images would do,
not what another training seed would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diki_ray.answering.figures import Along, TestSet
from diki_ray.answering.metrics import MEANS

COMPARED = ("zero_shot", *MEANS)
"""Two evaluations are compared by these metrics, which are means over images."""
NUM_RESAMPLES = 10_000
LEVEL = 0.95
SETTINGS = ("routing", "label_space", "split", "order")


def compare(
    run: Along, other: Along, num_resamples: int = NUM_RESAMPLES, level: float = LEVEL, seed: int = 0
) -> dict[str, Any]:
    """`other` less `run`, over the images of test sets that both have learnt; JSON values.

    Each difference has `low` and `high`, a percentile interval at `level`; `significant`: 0 lies outside it.
    """
    random = np.random.default_rng(seed)
    ours = {t.name: t for t in run.test_sets if t.learnt_at is not None}
    theirs = {t.name: t for t in other.test_sets if t.learnt_at is not None}
    shared, rows = [name for name in ours if name in theirs], []
    notes = [
        f"{name} differs: {run.settings[name]} and {other.settings[name]}"
        for name in SETTINGS
        if run.settings[name] != other.settings[name]
    ]
    notes += [f"{name}: only one of them has learnt it" for name in ours.keys() ^ theirs.keys()]
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {metric: [] for metric in COMPARED}
    for name in shared:
        a, b = aligned(ours[name], theirs[name])
        if not len(a):
            notes.append(f"{name}: not the same test images; left out")
            continue
        if len(a) < max(len(ours[name].keys), len(theirs[name].keys)):
            notes.append(f"{name}: {len(a)} test images are in both, the others are left out")
        last = None
        for metric in COMPARED:
            left, right = scores(ours[name], metric), scores(theirs[name], metric)
            if left is not None and right is not None:
                pairs[metric].append((left[a], right[b]))
                last = _difference([pairs[metric][-1]], num_resamples, level, random)
        rows.append({"name": name, "num_images": len(a), "last": last})
    return {
        "run": run.run,
        "other": other.run,
        "level": level,
        "num_resamples": num_resamples,
        "notes": sorted(notes),
        "metrics": {
            metric: _difference(found, num_resamples, level, random) if found else None
            for metric, found in pairs.items()
        },
        "test_sets": rows,
    }


def scores(t: TestSet, metric: str) -> np.ndarray | None:
    """Each image's share [N] of a metric of its test set; None where it is not defined (Transfer of the first task)."""
    if metric == "zero_shot":
        return t.correct[0].astype(float)
    assert t.learnt_at is not None
    return MEANS[metric](t.correct[1:], t.learnt_at)


def aligned(a: TestSet, b: TestSet) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the same images in both: same key and same class."""
    there = {(key, b.class_names[label]): n for n, (key, label) in enumerate(zip(b.keys, b.labels, strict=True))}
    rows = [
        (n, there[key, a.class_names[label]])
        for n, (key, label) in enumerate(zip(a.keys, a.labels, strict=True))
        if (key, a.class_names[label]) in there
    ]
    left, right = np.array(rows, dtype=int).reshape(-1, 2).T
    return left, right


def _difference(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], num_resamples: int, level: float, random: np.random.Generator
) -> dict[str, Any]:
    differences = [right - left for left, right in pairs]
    low, high = interval(differences, num_resamples, level, random)
    values = (np.mean([left.mean() for left, _ in pairs]), np.mean([right.mean() for _, right in pairs]))
    return {
        "run": round(float(values[0]), 6),
        "other": round(float(values[1]), 6),
        "difference": round(float(np.mean([d.mean() for d in differences])), 6),
        "low": round(low, 6),
        "high": round(high, 6),
        "significant": not low <= 0 <= high,
    }


def interval(
    differences: Sequence[np.ndarray], num_resamples: int, level: float, random: np.random.Generator
) -> tuple[float, float]:
    """Percentile bootstrap of the mean over test sets of the mean over images; images are drawn within a test set.

    A resample of N values is a multinomial draw of how often each distinct value comes up: there are few of them (−1,
    0 and 1 for Last), so 10,000 resamples of any number of images take milliseconds.
    """
    total = np.zeros(num_resamples)
    for values in differences:
        distinct, counts = np.unique(np.round(values, 12), return_counts=True)
        drawn = random.multinomial(len(values), counts / counts.sum(), size=num_resamples)
        total += drawn @ distinct / len(values)
    low, high = np.quantile(total / len(differences), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
