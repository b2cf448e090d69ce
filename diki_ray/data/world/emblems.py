"""Emblems of the embedded world: shapes, letters, digits and pictograms as white-on-black masks.

Every picture of the world shows an emblem, and an emblem is always the same thing: a square mask whose figure is
centred and fills the same box. Drawing styles therefore need to know nothing about what they draw, and an expensive
glyph is rasterised once per process. Fonts are those that matplotlib installs, so nothing is fetched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Pictures are drawn at twice the delivered size and box-filtered down: smooth edges without an antialiasing painter.
CANVAS_PX = 96
# Side of an emblem's own mask. Larger than the canvas, so that placing one never enlarges it.
MASK_PX = 128
# Share of the mask's side that the figure's longer side fills; the rest is room to rotate.
_FILL = 0.80

_Grid = np.ndarray
_Inside = Callable[[_Grid, _Grid], np.ndarray]


def _regular(num_corners: int, turn: float = -0.5, inner: float | None = None) -> list[tuple[float, float]]:
    """Corners of a regular polygon, or of a star when `inner` is the inner radius; `turn` in units of pi."""
    steps = num_corners if inner is None else 2 * num_corners
    radii = [1.0 if inner is None or step % 2 == 0 else inner for step in range(steps)]
    angles = [math.pi * (turn + 2 * step / steps) for step in range(steps)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "rectangle": [(-1, -0.5), (1, -0.5), (1, 0.5), (-1, 0.5)],
    "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
    "diamond": [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)],
    "pentagon": _regular(5),
    "hexagon": _regular(6, turn=0.0),
    "star": _regular(5, inner=0.42),
    "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)],
    "cross": [
        (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33),
        (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33),
    ],
    "lightning": [(0.35, -1), (-0.55, 0.12), (-0.05, 0.12), (-0.35, 1), (0.55, -0.22), (0.05, -0.22)],
    "house": [(0, -1), (1, -0.1), (0.72, -0.1), (0.72, 0.95), (-0.72, 0.95), (-0.72, -0.1), (-1, -0.1)],
}  # fmt: skip

_REGIONS: dict[str, _Inside] = {
    "circle": lambda x, y: x**2 + y**2 < 1,
    "oval": lambda x, y: x**2 + (y / 0.62) ** 2 < 1,
    "ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.36),
    "crescent": lambda x, y: (x**2 + y**2 < 1) & ((x - 0.5) ** 2 + y**2 > 0.6),
    "heart": lambda x, y: (1.44 * x**2 + (1.2 * y + 0.12) ** 2 - 0.9) ** 3 + 1.7 * x**2 * (1.2 * y + 0.12) ** 3 < 0,
    "drop": lambda x, y: np.where(y > 0.3, x**2 + (y - 0.3) ** 2 < 0.49, (np.abs(x) < 0.7 * (y + 1) / 1.3) & (y > -1)),
    "semicircle": lambda x, y: (x**2 + (y - 0.5) ** 2 < 1) & (y < 0.5),
    "balloon": lambda x, y: (
        (x**2 / 0.46 + (y + 0.35) ** 2 / 0.42 < 1)
        | ((np.abs(x) < 0.55 * (y - 0.2)) & (y > 0.2) & (y < 0.43))
        | ((np.abs(x - 0.06 * np.sin(9 * y)) < 0.035) & (y > 0.4) & (y < 1))
    ),
}

SHAPES: tuple[str, ...] = tuple(sorted((set(_POLYGONS) | set(_REGIONS)) - {"balloon"}))

# Everyday pictograms that DejaVu Sans draws, under the word a caption would use.
PICTOGRAMS: dict[str, str] = {
    "umbrella": "☂", "snowman": "☃", "phone": "☎", "cup": "☕", "skull": "☠", "smile": "☺", "frown": "☹",
    "spade": "♠", "club": "♣", "note": "♪", "anchor": "⚓", "swords": "⚔", "scales": "⚖", "gear": "⚙",
    "scissors": "✂", "plane": "✈", "envelope": "✉", "hand": "✌", "pencil": "✏", "snowflake": "❄", "flower": "✿",
    "sun": "☀", "cloud": "☁", "flag": "⚑", "clover": "☘", "wheelchair": "♿", "comet": "☄", "atom": "⚛",
    "hammers": "⚒", "recycling": "♻", "infinity": "∞",
}  # fmt: skip


@functools.cache
def shape(name: str) -> Image.Image:
    """Mask of a named shape (`SHAPES`, or "balloon")."""
    side = 4 * MASK_PX
    if name in _POLYGONS:
        drawn = Image.new("L", (side, side))
        half = side / 2
        corners = [(half + 0.9 * half * x, half + 0.9 * half * y) for x, y in _POLYGONS[name]]
        ImageDraw.Draw(drawn).polygon(corners, fill=255)
    elif name in _REGIONS:
        axis = np.linspace(-1.1, 1.1, side)
        inside = _REGIONS[name](axis[None, :], axis[:, None])
        drawn = Image.fromarray((np.broadcast_to(inside, (side, side)) * 255).astype(np.uint8))
    else:
        raise ValueError(f"unknown shape {name!r}; known: {', '.join((*SHAPES, 'balloon'))}")
    return _boxed(drawn)


@functools.cache
def glyph(character: str, font: str) -> Image.Image:
    """Mask of one character in a font that matplotlib ships (its file name without `.ttf`)."""
    import matplotlib  # a slow import that drawing alone needs

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    # Basic layout: the same outlines whether or not this machine's Pillow found a text-shaping library.
    typeface = ImageFont.truetype(str(path), 3 * MASK_PX, layout_engine=ImageFont.Layout.BASIC)
    side = 8 * MASK_PX
    drawn = Image.new("L", (side, side))
    ImageDraw.Draw(drawn).text((side // 4, side // 8), character, fill=255, font=typeface)
    return _boxed(drawn)


def _boxed(drawn: Image.Image) -> Image.Image:
    """The figure alone, centred, its longer side filling `_FILL` of a `MASK_PX` square."""
    box = drawn.getbbox()
    if box is None:
        raise ValueError("the font has no outline for this character")
    figure = drawn.crop(box)
    scale = _FILL * MASK_PX / max(figure.size)
    size = (max(1, round(scale * figure.width)), max(1, round(scale * figure.height)))
    figure = figure.resize(size, Image.Resampling.LANCZOS)
    mask = Image.new("L", (MASK_PX, MASK_PX))
    mask.paste(figure, ((MASK_PX - size[0]) // 2, (MASK_PX - size[1]) // 2))
    return mask


def placed(
    emblem: Image.Image,
    size_px: float,
    angle: float = 0.0,
    slant: float = 0.0,
    centre_px: tuple[float, float] = (CANVAS_PX / 2, CANVAS_PX / 2),
) -> Image.Image:
    """The emblem on a canvas-sized mask: longer side `size_px`, turned by `angle` radians, sheared by `slant`."""
    scale = _FILL * MASK_PX / size_px
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    # Pillow maps canvas to emblem: translate to the centre, turn and shear, translate back.
    matrix = (cos + slant * -sin, sin + slant * cos, 0.0, -sin, cos, 0.0)
    x, y = centre_px
    half = MASK_PX / 2
    offset_x = half - matrix[0] * x - matrix[1] * y
    offset_y = half - matrix[3] * x - matrix[4] * y
    return emblem.transform(
        (CANVAS_PX, CANVAS_PX),
        Image.Transform.AFFINE,
        (matrix[0], matrix[1], offset_x, matrix[3], matrix[4], offset_y),
        Image.Resampling.BILINEAR,
    )
