"""Hours that a benchmark takes with ViT-B/16, computed: from counts, the cost model and an assumed rate of the card.

    python -m benchmarks.mtil_hours --protocol mtil-1/coop --tflops 50 150 400

Nothing here is measured. The rate is what the towers' matrix products reach all in all, not what a data sheet says.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from benchmarks.cost_model import Link, Step, step_seconds
from diki_ray.config.protocols import catalogue, protocol

IMAGE_FLOP = 35e9
"""Of a forward pass of the image tower for one image; a training step takes twice that (docs/benchmarks.md)."""
CLASS_FLOP = 1.2e9
"""Of a forward pass of the text tower for one caption of 16 tokens."""
EPOCHS, BATCH, FLOOR_S = 10, 128, 0.004
EVALUATION_PASSES = 3
"""Of the image tower for a test image: frozen, and under the one or two modules that ever answer it. A guess."""
LINK = Link(bytes_per_s=25e9 / 8, latency_s=50e-6)
"""25 Gbit/s between cards: slower than what joins the cards of one machine."""


@dataclass(frozen=True)
class Sizes:
    """Of one data set under a split protocol, as published."""

    name: str
    num_classes: int
    train: int
    val: int
    test: int


def sizes_of(benchmark: str) -> list[Sizes]:
    """A fifth of the training images is held out where a split is published without validation."""
    name, _, split = benchmark.partition("/")
    found = []
    for dataset in protocol(name).order:
        variant = catalogue()[dataset].variants[split]
        train, val, test = (variant.known_sizes.get(part, 0) for part in ("train", "val", "test"))
        val = val or round(train / 5)
        train = train if "val" in variant.known_sizes else train - val
        if (shots := protocol(name).shots) is not None:
            train, val = min(train, shots * variant.num_classes), min(val, min(shots, 4) * variant.num_classes)
        found.append(Sizes(dataset, variant.num_classes, train, val, test))
    return found


def learning_seconds(data: Sizes, flop_per_s: float, num_workers: int) -> float:
    """Training, validation after each epoch, and the pass for the statistics, of one task on some cards."""
    step = Step(
        image_s=2 * BATCH * IMAGE_FLOP / flop_per_s,
        text_s=2 * data.num_classes * CLASS_FLOP / flop_per_s,
        num_classes=data.num_classes,
        floor_s=FLOOR_S,
    )
    steps = EPOCHS * -(-data.train // BATCH)
    forward = (EPOCHS * data.val + data.train) * IMAGE_FLOP / flop_per_s / num_workers
    return steps * step_seconds(step, LINK, num_workers) + forward


def stream_seconds(stream: list[Sizes], flop_per_s: float, num_workers: int, groups: int) -> float:
    """Learning all tasks in worker groups side by side (`schedule.concurrent_tasks`), then evaluating on all cards."""
    loads = [(0, 0.0)] * groups  # images and seconds; shared out as diki_ray/runs/train/group.py does
    for data in sorted(stream, key=lambda d: -d.train):
        least = min(range(groups), key=lambda g: loads[g][0])
        images, seconds = loads[least]
        loads[least] = (images + data.train, seconds + learning_seconds(data, flop_per_s, num_workers))
    tested = sum(d.test for d in stream) * EVALUATION_PASSES * IMAGE_FLOP / flop_per_s / (num_workers * groups)
    return max(seconds for _, seconds in loads) + tested


def num_decoded(stream: list[Sizes]) -> int:
    """Images that are decoded: in every epoch, for the statistics, and once to be answered."""
    return sum(EPOCHS * (d.train + d.val) + d.train + d.test for d in stream)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", default="mtil-1/coop")
    parser.add_argument("--tflops", type=float, nargs="+", default=[50, 150, 400])
    arguments = parser.parse_args()
    stream = sizes_of(arguments.protocol)
    print(*(f"{sum(getattr(d, part) for d in stream):,} {part} images" for part in ("train", "val", "test")), sep=", ")
    print(f"{num_decoded(stream):,} images decoded")
    print("| TFLOP/s | 1 card | 8 cards, a task at a time | 8 x 1 | 4 x 2 |")
    for rate in arguments.tflops:
        ways = [(1, 1), (8, 1), (1, 8), (2, 4)]
        minutes = [stream_seconds(stream, 1e12 * rate, workers, groups) / 60 for workers, groups in ways]
        print(f"| {rate:g} |", " | ".join(f"{m:.1f} min" for m in minutes), "|")


if __name__ == "__main__":
    main()
