"""Draws docs/images/overview.svg; text becomes outlines, so that it looks the same with any fonts.

python docs/draw_overview.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "diki_ray", "font.family": "DejaVu Sans"})
WIDTH, HEIGHT = 960, 410
INK, QUIET, FROZEN, PLAIN, MODULE = "#1c2733", "#526173", "#e8eef7", "#ffffff", "#fbeddc"


def box(axes: Axes, x: int, y: int, width: int, height: int, title: str, lines: tuple[str, ...], fill: str) -> None:
    """A box with its title and the lines below it."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=6", fc=fill, ec="#44546a", lw=1)
    axes.add_patch(shape)
    axes.text(x + 12, y + 24, title, size=9.4, color=INK, weight="bold", va="baseline")
    for n, line in enumerate(lines):
        axes.text(x + 12, y + 46 + 20 * n, line, size=8.2, color=QUIET, va="baseline")


def arrow(axes: Axes, start: tuple[int, int], end: tuple[int, int]) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=QUIET, lw=1.1, shrinkA=2, shrinkB=2)
    )


def heading(axes: Axes, y: int, text: str) -> None:
    axes.text(24, y, text, size=10, color=INK, weight="bold", va="baseline")


def main() -> None:
    figure = pyplot.figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor="#fbfcfe")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.axis("off")

    heading(axes, 34, "Learning: every task for itself, so tasks run side by side and in any order")
    learning = (
        (24, "WebDataset shards", ("the same batches for", "any number of workers"), PLAIN),
        (262, "Ray Train workers", ("one group goes through", "all tasks that are to do"), PLAIN),
        (500, "Module of a task", ("prompts, and the sums of", "its features by class"), MODULE),
        (738, "Store", ("a log on disk, S3, GCS", "that outlives any process"), PLAIN),
    )
    for x, title, lines, fill in learning:
        box(axes, x, 52, 198, 84, title, lines, fill)
        if x > 24:
            arrow(axes, (x - 40, 94), (x, 94))

    heading(axes, 186, "Answering: the image decides which module speaks, how loudly, and what the classes say")
    clip = ("features, and the", "zero-shot logits:", "where nothing is", "learnt, they are", "the answer")
    model = (
        *("from the sums of all modules:", "p(image | task), the task t*"),
        *("w: t* against a class never", "seen, 0 to 1", "logits of the learnt classes"),
    )
    module = ("prompts beside the", "frozen attention of", "both towers, weighed", "image by image:", "its own logits")
    box(axes, 24, 240, 96, 84, "Image", ("and class", "names"), PLAIN)
    box(axes, 158, 208, 170, 148, "Frozen CLIP", clip, FROZEN)
    box(axes, 366, 208, 236, 148, "Class model", model, MODULE)
    box(axes, 640, 208, 176, 148, "CLIP + w · module t*", module, FROZEN)
    box(axes, 854, 240, 82, 84, "Class", ("sum of", "logits"), PLAIN)
    for start, end in ((120, 158), (328, 366), (602, 640), (816, 854)):
        arrow(axes, (start, 282), (end, 282))
    last = "A removed task leaves the bits of never having been there."
    axes.text(24, 392, last, size=8.2, color=QUIET, va="baseline")
    figure.savefig(Path(__file__).parent / "images" / "overview.svg", metadata={"Date": None}, facecolor="#fbfcfe")


if __name__ == "__main__":
    main()
