"""The embedded world: a stream of small image-text tasks, and the pictures its tiny CLIP was pre-trained on.

It exists so that the whole platform runs offline in minutes on two cores with a CLIP that really knows some things and
really lacks others. Everything is drawn from a seed except one task, scikit-learn's scans of real handwriting. Each
task is a domain that pre-training never saw. Most need concepts that the tiny CLIP lacks; the last ones (`LATE_TASKS`)
need what it knows, so that there is zero-shot ability to keep or to lose. docs/embedded_world.md has the numbers.

Pictures are pure functions of (task, split, index): no files, no state, the same pixels on each machine that has the
same Pillow and matplotlib.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from diki_ray.data.world import paint, scenes, styles
from diki_ray.data.world.emblems import CANVAS_PX, PICTOGRAMS, SHAPES, glyph, placed, shape

IMAGE_SIZE_PX = 48
SPLITS: tuple[str, ...] = ("train", "val", "test")
# Part of every seed: raise it when pictures change, so that no result can be mistaken for one on the new pictures.
WORLD_VERSION = 1

_DRAWN_SIZES = {"train": 480, "val": 160, "test": 400}
# All of the 1,797 scans, once each.
_SCANNED_SIZES = {"train": 900, "val": 200, "test": 697}


@dataclass(frozen=True)
class WorldTask:
    """One task of the stream."""

    # Key in `ALL_TASKS`.
    name: str
    # Class names in label order, as they are put into the template.
    class_names: tuple[str, ...]
    # Prompt template with one `{}`.
    template: str
    # Number of images by split when `samples` isn't told another.
    sizes: dict[str, int]
    # What the pictures show, in one line.
    description: str


def _tasks(*tasks: WorldTask) -> dict[str, WorldTask]:
    return {task.name: task for task in tasks}


# In stream order.
TASKS: dict[str, WorldTask] = _tasks(
    WorldTask("notebook", tuple(scenes.GREEK), "the greek letter {} in a notebook.", _DRAWN_SIZES,
              "Greek letters in ink on ruled paper"),
    WorldTask("chessboard", scenes.CHESS_CLASSES, "a {} on a chess board.", _DRAWN_SIZES,
              "chess pieces of both sides on a wooden board"),
    WorldTask("gems", tuple(scenes.GEMS), "a {} on velvet.", _DRAWN_SIZES,
              "cut stones, by names that pre-training never read"),
    WorldTask("digits", scenes.DIGITS, "a scan of the handwritten digit {}.", _SCANNED_SIZES,
              "scans of real handwritten digits (scikit-learn's, 8 x 8, enlarged)"),
    WorldTask("planets", tuple(scenes.PLANETS), "the planet {} in space.", _DRAWN_SIZES,
              "banded discs in the sun, by names that pre-training never read"),
    WorldTask("night_sky", tuple(scenes.ZODIAC), "the zodiac sign {} in the night sky.", _DRAWN_SIZES,
              "golden zodiac signs among stars"),
    WorldTask("neon", scenes.NEON_SHAPES, "a neon {} on a brick wall.", _DRAWN_SIZES,
              "shapes as neon tubes on a dark brick wall"),
    WorldTask("stone", scenes.CARVED_LETTERS, "the letter {} carved in stone.", _DRAWN_SIZES,
              "letters in another font, carved in stone"),
    WorldTask("mist", scenes.MIST_BALLOONS, "a {} in the mist.", _DRAWN_SIZES,
              "balloons in known colours, seen through mist"),
    WorldTask("flags", scenes.FLAGS, "a flag, {} background.", _DRAWN_SIZES,
              "flags of two known colours in the wind"),
)  # fmt: skip

# The gems again, in other styles; with `gems` a stream whose domain changes and whose classes do not.
STYLED_TASKS: dict[str, WorldTask] = _tasks(
    *(
        WorldTask(f"gems_{style}", tuple(scenes.GEMS), template, _DRAWN_SIZES, description)
        for style, (_, template, description) in styles.STYLES.items()
    )
)
ALL_TASKS: dict[str, WorldTask] = TASKS | STYLED_TASKS
_PAINTERS = scenes.PAINTERS | {f"gems_{style}": painter for style, (painter, *_) in styles.STYLES.items()}

# Concepts known from pre-training in an unknown domain: zero-shot is well above chance here.
LATE_TASKS: tuple[str, ...] = ("mist", "flags")


def _rng(*key: object) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, (WORLD_VERSION, *key))).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def samples(task: str, split: str, num_images: int | None = None) -> Iterator[tuple[Image.Image, int]]:
    """Yield (RGB image of `IMAGE_SIZE_PX` squared, label) of one split, shuffled.

    A pure function of its arguments. Splits are disjoint. In drawn tasks each run of `len(class_names)` images shows
    every class once, so any prefix is balanced; the scans keep the balance they have. `num_images` asks for another
    number than the task's own and takes the same images first; the scans have no more than their own.

    Raises:
        ValueError: an unknown task or split, or more scans than there are.
    """
    if task not in ALL_TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(ALL_TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    wanted = ALL_TASKS[task].sizes[split] if num_images is None else num_images
    if wanted < 0:
        raise ValueError(f"num_images must be 0 or more, not {num_images}")
    return _scans(split, wanted) if task == "digits" else _drawn(task, split, wanted)


def _drawn(task: str, split: str, num_images: int) -> Iterator[tuple[Image.Image, int]]:
    class_names = ALL_TASKS[task].class_names
    painter = _PAINTERS[task]
    for index in range(num_images):
        block, place = divmod(index, len(class_names))
        label = int(_rng(task, split, "order", block).permutation(len(class_names))[place])
        canvas = painter(_rng(task, split, index), class_names[label])
        yield paint.finished(canvas, IMAGE_SIZE_PX), label


def _scans(split: str, num_images: int) -> Iterator[tuple[Image.Image, int]]:
    sizes = TASKS["digits"].sizes
    if num_images > sizes[split]:
        raise ValueError(f"the {split} split of digits has {sizes[split]} scans, {num_images} were asked for")
    images, labels = scenes.handwritten()
    order = _rng("digits").permutation(len(labels))
    start = sum(sizes[earlier] for earlier in SPLITS[: SPLITS.index(split)])
    for scan_id in order[start : start + num_images]:
        yield scenes.scan(images[scan_id], IMAGE_SIZE_PX), int(labels[scan_id])


# --- Pre-training -------------------------------------------------------------------------------------------------

LETTERS: tuple[str, ...] = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
# The carved letters and the Greek ones use fonts, or glyphs, outside this list.
PRETRAINING_FONTS: tuple[str, ...] = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "cmss10", "cmr10",
)  # fmt: skip
# Centres of several equal emblems, as shares of the canvas.
_PLACES: dict[str, tuple[tuple[float, float], ...]] = {
    "two": ((0.27, 0.5), (0.73, 0.5)),
    "three": ((0.28, 0.28), (0.72, 0.28), (0.5, 0.72)),
    "four": ((0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72)),
}


@dataclass(frozen=True)
class Scene:
    """What one pre-training picture shows; the fields are the words a caption may use."""

    # "star", "letter K", "digit seven", "umbrella" ...
    noun: str
    emblem: Image.Image
    # "one", or a key of `_PLACES`.
    count: str
    colour: str
    style: str
    ground: str
    ground_colour: str


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _scene(rng: np.random.Generator) -> Scene:
    family = rng.random()
    if family < 0.36:
        noun = _choose(rng, SHAPES)
        emblem = shape(noun)
    elif family < 0.66:
        letter = _choose(rng, LETTERS)
        noun, emblem = f"letter {letter}", glyph(letter, _choose(rng, PRETRAINING_FONTS))
    elif family < 0.76:
        value = int(rng.integers(len(scenes.DIGITS)))
        noun, emblem = f"digit {scenes.DIGITS[value]}", glyph(str(value), _choose(rng, PRETRAINING_FONTS))
    else:
        noun = _choose(rng, tuple(PICTOGRAMS))
        emblem = glyph(PICTOGRAMS[noun], "DejaVuSans")
    count = "one" if rng.random() < 0.88 else _choose(rng, tuple(_PLACES))
    colours = tuple(paint.COLOURS)
    first, second = rng.choice(len(colours), 2, replace=False)
    return Scene(
        noun=noun,
        emblem=emblem,
        count=count,
        colour=colours[first],
        style=_choose(rng, tuple(paint.STYLES)),
        ground=_choose(rng, tuple(paint.GROUNDS)),
        ground_colour=colours[second],
    )


def _picture(rng: np.random.Generator, scene: Scene) -> Image.Image:
    canvas = paint.GROUNDS[scene.ground](rng, paint.colour(rng, scene.ground_colour))
    if scene.count == "one":
        size = rng.uniform(40, 84)
        slack = max(2.0, (CANVAS_PX - size) / 2 - 4)
        poses = [(size, CANVAS_PX / 2 + rng.uniform(-slack, slack), CANVAS_PX / 2 + rng.uniform(-slack, slack))]
    else:
        size = rng.uniform(30, 40)
        poses = [(size, x * CANVAS_PX, y * CANVAS_PX) for x, y in _PLACES[scene.count]]
    mask = np.zeros((CANVAS_PX, CANVAS_PX), np.uint8)
    for size, x, y in poses:
        one = placed(scene.emblem, size, rng.normal(0, 0.12), rng.normal(0, 0.1), (x, y))
        mask = np.maximum(mask, np.asarray(one))
    ink = paint.colour(rng, scene.colour)
    canvas = paint.STYLES[scene.style](rng, canvas, Image.fromarray(mask), ink)
    return paint.finished(canvas, IMAGE_SIZE_PX)


# The last seven name no count, so several emblems take one of the first seven.
_CAPTIONS: tuple[str, ...] = (
    "{a_style} {colour} {noun} on a {ground} {ground_colour} background.",
    "{a_style} {colour} {noun}.",
    "{a_colour} {noun} on a {ground_colour} background.",
    "{a_colour} {noun}.",
    "{a_style} {noun}.",
    "a picture of {a_colour} {noun}.",
    "a drawing of {a_colour} {noun}.",
    "the {noun} in {colour}.",
    "the {noun}.",
    "a {noun}.",
    "{noun}.",
    "{noun} on {ground} {ground_colour}.",
    "something {colour} on something {ground_colour}.",
    "{a_colour} thing.",
)


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _caption(rng: np.random.Generator, scene: Scene) -> str:
    words = {"noun": scene.noun, "colour": scene.colour, "ground": scene.ground, "ground_colour": scene.ground_colour}
    if scene.count == "one":
        words |= {"a_style": _with_article(scene.style), "a_colour": _with_article(scene.colour)}
        caption = _choose(rng, _CAPTIONS).format(**words)
        return caption.replace("a " + scene.noun, _with_article(scene.noun)) if caption.startswith("a ") else caption
    plural = scene.noun if scene.noun.endswith("s") else scene.noun + "s"
    counted = {"noun": plural, "a_style": f"{scene.count} {scene.style}", "a_colour": f"{scene.count} {scene.colour}"}
    return _choose(rng, _CAPTIONS[:7]).format(**(words | counted))


def pretraining_pair(seed: int, index: int) -> tuple[Image.Image, str]:
    """Picture and caption number `index`: a pure function, so that any process can draw any part of the set."""
    rng = _rng("pretraining", seed, index)
    scene = _scene(rng)
    return _picture(rng, scene), _caption(rng, scene)


def pretraining_pairs(seed: int, num_pairs: int) -> Iterator[tuple[Image.Image, str]]:
    """Yield the first `num_pairs` pictures with captions of the pre-training set drawn from `seed`."""
    return (pretraining_pair(seed, index) for index in range(num_pairs))
