"""Gems in several styles: the same ten classes, told apart by the same colours, in image domains of their own.

For streams in which the domain changes and the classes do not. A sixth style is the task `gems` itself (scenes.py). No
ground or manner of drawing occurs in the pre-training pictures, nor in another style.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from diki_ray.data.world import paint
from diki_ray.data.world.emblems import CANVAS_PX, placed, shape
from diki_ray.data.world.scenes import GEMS

_ROWS, _COLUMNS = np.mgrid[0:CANVAS_PX, 0:CANVAS_PX].astype(np.float32)
_CUTS = ("hexagon", "diamond", "pentagon", "oval")
"""Any gem may have any of these cuts."""


def _cut(rng: np.random.Generator) -> Image.Image:
    """The mask of a stone, somewhere near the middle."""
    x, y = CANVAS_PX / 2 + rng.uniform(-8, 8, 2)
    return placed(shape(str(rng.choice(_CUTS))), rng.uniform(54, 76), rng.uniform(-0.5, 0.5), 0.0, (x, y))


def _colour(rng: np.random.Generator, class_name: str) -> np.ndarray:
    return np.clip(np.asarray(GEMS[class_name]) + rng.normal(0, 10, 3), 0, 255)


def sketch(rng: np.random.Generator, class_name: str) -> paint.Canvas:
    """Coloured pencil on drawing paper: strokes that leave paper between them, and a grey outline."""
    paper = np.asarray((238, 234, 226)) + rng.normal(0, 4, 3)
    canvas = paint.filled(paper) + 5 * paint.grain(rng)[..., None]
    stone, angle = _cut(rng), rng.uniform(0.3, 1.2)
    strokes = paint.waves(rng, rng.uniform(4, 6), angle) + 0.7 * paint.grain(rng)
    canvas = paint.blend(canvas, paint.alpha(stone) * np.clip(0.55 + 0.5 * strokes, 0, 0.9), _colour(rng, class_name))
    return paint.blend(canvas, 0.8 * paint.rim(stone, 3), np.asarray((92, 92, 98)))


def stained_glass(rng: np.random.Generator, class_name: str) -> paint.Canvas:
    """Panes in lead against the light: the stone's panes of its colour, those around it of pale ones."""
    corners = rng.uniform(0, CANVAS_PX, (16, 2)).astype(np.float32)
    distance = np.hypot(_ROWS[..., None] - corners[:, 0], _COLUMNS[..., None] - corners[:, 1])
    nearest = np.sort(distance, axis=-1)
    pane = distance.argmin(-1)
    pale = np.asarray((206, 214, 196)) + rng.normal(0, 14, (16, 3))
    light = rng.uniform(0.8, 1.3, 16)[pane][..., None]
    inside = paint.alpha(_cut(rng))
    canvas = paint.blend(pale[pane].astype(np.float32), inside, _colour(rng, class_name)) * light
    lead = np.clip(2.5 - (nearest[..., 1] - nearest[..., 0]), 0, 1)
    edge = np.clip(4 * inside * (1 - inside), 0, 1)
    return paint.blend(canvas, np.maximum(lead, edge), np.asarray((26, 24, 28)))


def pixels(rng: np.random.Generator, class_name: str) -> paint.Canvas:
    """A sprite of an old game: large square pixels of three tones on a dark green screen with scan lines."""
    side = 8
    mask = _cut(rng).resize((CANVAS_PX // side, CANVAS_PX // side), Image.Resampling.BOX)
    coarse = np.asarray(mask, np.float32)[..., None] / 255
    rows, columns = np.mgrid[0 : CANVAS_PX // side, 0 : CANVAS_PX // side]
    tone = np.asarray((0.7, 1.0, 1.25))[(rows + columns + int(rng.integers(3))) % 3][..., None]
    screen = np.asarray((14, 44, 30)) + rng.normal(0, 3, 3)
    sprite = np.where(coarse > 0.5, np.clip(_colour(rng, class_name) * tone, 0, 255), screen)
    canvas = np.kron(sprite, np.ones((side, side, 1))).astype(np.float32)
    return canvas * (1 - 0.25 * (_ROWS % 4 < 1))[..., None]


def poster(rng: np.random.Generator, class_name: str) -> paint.Canvas:
    """A screen print: dots of ink on ochre paper, and the colour a little beside its black outline."""
    canvas = paint.filled(np.asarray((214, 168, 92)) + rng.normal(0, 5, 3)) + 4 * paint.grain(rng)[..., None]
    stone, angle, period = _cut(rng), rng.uniform(0.5, 1.0), rng.uniform(5, 7)
    screen = paint.waves(rng, period, angle) + paint.waves(rng, period, angle + np.pi / 2)
    ink = np.roll(paint.alpha(stone), tuple(int(v) for v in rng.integers(-3, 4, 2)), (0, 1))
    canvas = paint.blend(canvas, ink * np.clip(2 * (screen + 1.1), 0.1, 1), _colour(rng, class_name))
    return paint.blend(canvas, paint.rim(stone, 5), np.asarray((20, 18, 22)))


def snow(rng: np.random.Generator, class_name: str) -> paint.Canvas:
    """A stone half sunk in fresh snow, in blue light."""
    hollows = paint.clouds(rng, 5)
    canvas = paint.filled(np.asarray((214, 226, 242)) + rng.normal(0, 4, 3)) + 12 * hollows[..., None]
    stone = _cut(rng)
    shadow = np.roll(paint.alpha(paint.blurred(stone, 4)), (6, 8), (0, 1))
    canvas = paint.blend(canvas, 0.45 * shadow, np.asarray((120, 146, 196)))
    bluish = 0.75 * _colour(rng, class_name) + 0.25 * np.asarray((150, 180, 230))
    drift = CANVAS_PX * rng.uniform(0.56, 0.68) + 5 * np.sin(_COLUMNS / rng.uniform(7, 12) + rng.uniform(0, 6)) > _ROWS
    height = np.clip(1.15 - 0.35 * (_ROWS / CANVAS_PX), 0, 2)[..., None]
    canvas = paint.blend(canvas, paint.alpha(stone) * drift, bluish * height)
    flakes = (rng.random((CANVAS_PX, CANVAS_PX)) < 0.02).astype(np.float32)
    flakes = np.maximum(flakes, np.roll(flakes, 1, 0))
    return paint.blend(canvas, np.maximum(flakes, np.roll(flakes, 1, 1)), np.asarray((252, 253, 255)))


STYLES: dict[str, tuple[Callable[[np.random.Generator, str], paint.Canvas], str, str]] = {
    "sketch": (sketch, "a pencil drawing of a {}.", "cut stones in coloured pencil on paper"),
    "glass": (stained_glass, "a stained glass window with a {}.", "cut stones in a stained glass window"),
    "pixels": (pixels, "a {} in a video game.", "cut stones as sprites on an old screen"),
    "poster": (poster, "a poster of a {}.", "cut stones in screen print on ochre paper"),
    "snow": (snow, "a {} in the snow.", "cut stones half sunk in snow"),
}
"""A style is known by the end of a task's name (`gems_snow`): painter, template, and what the pictures show."""
