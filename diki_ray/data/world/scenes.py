"""The image domains of the embedded world's tasks, one painter each.

No ground or manner of drawing here occurs in the pre-training pictures: that is what makes each task a domain of its
own, and its frozen features a cloud that one Gaussian can recognise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image

from diki_ray.data.world import paint
from diki_ray.data.world.emblems import CANVAS_PX, glyph, placed, shape

_ROWS, _COLUMNS = np.mgrid[0:CANVAS_PX, 0:CANVAS_PX].astype(np.float32)


def _pose(rng: np.random.Generator, emblem: Image.Image, smallest_px: float, largest_px: float) -> Image.Image:
    """The emblem somewhere near the middle, slightly turned and slanted."""
    size = rng.uniform(smallest_px, largest_px)
    slack = max(2.0, (CANVAS_PX - size) / 2 - 6)
    x, y = CANVAS_PX / 2 + rng.uniform(-slack, slack, 2)
    return placed(emblem, size, rng.normal(0, 0.10), rng.normal(0, 0.08), (x, y))


def _wobbled(rng: np.random.Generator, mask: Image.Image, strength_px: float) -> Image.Image:
    """The mask with its outline bent by smooth noise, as by an unsteady hand."""
    rows = np.clip(_ROWS + strength_px * paint.clouds(rng, 6), 0, CANVAS_PX - 1).astype(np.intp)
    columns = np.clip(_COLUMNS + strength_px * paint.clouds(rng, 6), 0, CANVAS_PX - 1).astype(np.intp)
    return Image.fromarray(np.asarray(mask)[rows, columns])


# --- Greek letters, in ink on ruled paper -------------------------------------------------------------------------

GREEK: dict[str, str] = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "theta": "θ", "lambda": "λ", "xi": "ξ", "pi": "π",
    "sigma": "σ", "phi": "φ", "psi": "ψ", "omega": "ω",
}  # fmt: skip
_INKS = ((28, 48, 130), (34, 34, 44), (96, 40, 110))
_PENS = ("STIXGeneralItalic", "DejaVuSerif-Italic", "DejaVuSans-Oblique")


def notebook(rng: np.random.Generator, class_name: str) -> paint.Canvas:
    paper = np.asarray((244, 238, 218)) + rng.normal(0, 4, 3)
    canvas = paint.filled(paper) + 3 * paint.grain(rng)[..., None]
    spacing, start = rng.uniform(13, 17), rng.uniform(0, 13)
    rules = np.mod(_ROWS - start, spacing) < 1.6
    canvas = paint.blend(canvas, 0.75 * rules, np.asarray((130, 170, 215)))
    margin = np.abs(_COLUMNS - rng.uniform(6, 20)) < 1.0
    canvas = paint.blend(canvas, 0.7 * margin, np.asarray((225, 100, 100)))
    written = _pose(rng, glyph(GREEK[class_name], str(rng.choice(_PENS))), 46, 76)
    ink = np.asarray(_INKS[rng.integers(len(_INKS))]) + rng.normal(0, 8, 3)
    return paint.blend(canvas, 0.92 * paint.alpha(_wobbled(rng, written, 3.5)), ink)


# --- Chess pieces on a wooden board -------------------------------------------------------------------------------

PIECES: dict[str, str] = {"king": "♚", "queen": "♛", "rook": "♜", "bishop": "♝", "knight": "♞", "pawn": "♟"}
CHESS_CLASSES: tuple[str, ...] = tuple(f"{side} {piece}" for piece in PIECES for side in ("white", "black"))


def chessboard(rng: np.random.Generator, class_name: str) -> paint.Canvas:
    side, piece = class_name.split()
    cell = rng.uniform(40, 54)
    shift = rng.uniform(0, 2 * cell, 2)
    dark = (np.floor((_ROWS + shift[0]) / cell) + np.floor((_COLUMNS + shift[1]) / cell)) % 2
    light_wood, dark_wood = np.asarray((224, 188, 138)), np.asarray((146, 90, 52))
    canvas = paint.blend(paint.filled(light_wood + rng.normal(0, 6, 3)), dark, dark_wood + rng.normal(0, 6, 3))
    fibres = np.sin(_COLUMNS * 0.12 + 9 * paint.clouds(rng, 3) + 0.9 * _ROWS)
    canvas = canvas + 7 * fibres[..., None]
    mask = _pose(rng, glyph(PIECES[piece], "DejaVuSans"), 52, 76)
    shadow = np.roll(paint.alpha(paint.blurred(mask, 2)), (3, 5), (0, 1))
    canvas = paint.blend(canvas, 0.5 * shadow, np.asarray((40, 22, 10)))
    body, edge = ((246, 240, 222), (70, 45, 25)) if side == "white" else ((38, 32, 30), (150, 130, 110))
    canvas = paint.blend(canvas, paint.alpha(mask), np.asarray(body) + rng.normal(0, 5, 3))
    return paint.blend(canvas, 0.8 * paint.rim(mask, 3), np.asarray(edge))


# --- Zodiac signs in the night sky --------------------------------------------------------------------------------

ZODIAC: dict[str, str] = {
    "aries": "♈", "taurus": "♉", "gemini": "♊", "cancer": "♋", "leo": "♌", "virgo": "♍", "libra": "♎",
    "scorpio": "♏", "sagittarius": "♐", "capricorn": "♑", "aquarius": "♒", "pisces": "♓",
}  # fmt: skip


def night_sky(rng: np.random.Generator, class_name: str) -> paint.Canvas:
    top, bottom = np.asarray((8, 10, 38)) + rng.normal(0, 4, 3), np.asarray((44, 30, 92)) + rng.normal(0, 10, 3)
    canvas = paint.blend(paint.filled(top), _ROWS / CANVAS_PX, bottom) + 9 * paint.clouds(rng, 4)[..., None]
    stars = np.zeros((CANVAS_PX, CANVAS_PX), np.float32)
    places = rng.integers(1, CANVAS_PX - 1, (int(rng.integers(25, 60)), 2))
    stars[places[:, 0], places[:, 1]] = rng.uniform(0.4, 1.0, len(places))
    stars = np.maximum(stars, np.roll(stars, 1, 0))
    canvas = paint.blend(canvas, np.maximum(stars, np.roll(stars, 1, 1)), np.asarray((235, 240, 255)))
    mask = _pose(rng, glyph(ZODIAC[class_name], "DejaVuSans"), 46, 74)
    gold = np.asarray((250, 204, 90)) + rng.normal(0, 10, 3)
    canvas = paint.blend(canvas, 0.55 * paint.alpha(paint.blurred(mask, 5)), gold * 0.7)
    return paint.blend(canvas, paint.alpha(mask), gold)


# --- Real handwritten digits --------------------------------------------------------------------------------------

DIGITS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@functools.lru_cache(maxsize=1)
def handwritten() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 scans (UCI optdigits): intensities 0..16 `[1797, 8, 8]` and labels `[1797]`."""
    from sklearn.datasets import load_digits  # a slow import that no other picture needs

    scans = load_digits()
    return scans.images, scans.target


def scan(intensities: np.ndarray, size_px: int) -> Image.Image:
    """One 8 x 8 scan as dark pen on light paper."""
    page = Image.fromarray((255 - 15 * intensities).astype(np.uint8))
    return page.resize((size_px, size_px), Image.Resampling.BICUBIC).convert("RGB")


# --- Shapes, as neon signs ----------------------------------------------------------------------------------------

NEON_SHAPES: tuple[str, ...] = (
    "circle", "square", "triangle", "star", "heart", "arrow", "cross", "hexagon", "crescent", "lightning", "house",
    "drop",
)  # fmt: skip
_TUBES = ((255, 60, 90), (60, 230, 255), (255, 90, 240), (120, 255, 110), (255, 180, 50))


def neon_sign(rng: np.random.Generator, class_name: str) -> paint.Canvas:
    brick = np.asarray((58, 30, 30)) + rng.normal(0, 5, 3)
    canvas = paint.filled(brick) + 6 * paint.grain(rng)[..., None]
    height, width, shift = rng.uniform(10, 13), rng.uniform(22, 28), rng.uniform(0, 20, 2)
    course = np.floor((_ROWS + shift[0]) / height)
    joints = (np.mod(_ROWS + shift[0], height) < 2) | (np.mod(_COLUMNS + shift[1] + course * width / 2, width) < 2)
    canvas = paint.blend(canvas, 0.8 * joints, np.asarray((26, 20, 24)))
    mask = _pose(rng, shape(class_name), 48, 74)
    tube = paint.rim(mask, 5)
    glow = paint.alpha(paint.blurred(Image.fromarray((255 * tube).astype(np.uint8)), rng.uniform(4, 6)))
    light = np.asarray(_TUBES[rng.integers(len(_TUBES))]) + rng.normal(0, 10, 3)
    canvas = canvas + 1.6 * glow[..., None] * light
    return paint.blend(canvas, tube, 0.55 * light + 0.45 * 255)


# --- Known colours through mist -----------------------------------------------------------------------------------

MIST_BALLOONS: tuple[str, ...] = tuple(
    f"{colour} balloon" for colour in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
)


def mist(rng: np.random.Generator, class_name: str) -> paint.Canvas:
    air = np.asarray((186, 194, 200)) + rng.normal(0, 6, 3)
    veil = paint.clouds(rng, 4)
    canvas = paint.filled(air) + 16 * veil[..., None] - 12 * (_ROWS / CANVAS_PX)[..., None]
    hills = CANVAS_PX * 0.72 + 9 * np.sin(_COLUMNS / rng.uniform(9, 16) + rng.uniform(0, 6)) < _ROWS
    canvas = paint.blend(canvas, 0.25 * hills, np.asarray((120, 132, 140)))
    mask = paint.blurred(_pose(rng, shape("balloon"), 50, 82), 1.2)
    thickness = np.clip(rng.uniform(0.16, 0.42) + 0.18 * veil, 0.05, 0.9)
    return (
        paint.blend(canvas, paint.alpha(mask) * thickness, paint.colour(rng, class_name.split()[0]))
        + 3 * paint.grain(rng)[..., None]
    )


# --- Letters, carved in stone -------------------------------------------------------------------------------------

CARVED_LETTERS: tuple[str, ...] = tuple("BEGHKMNQRSTZ")


def carved_stone(rng: np.random.Generator, class_name: str) -> paint.Canvas:
    rock = np.asarray((168, 158, 140)) + rng.normal(0, 7, 3)
    canvas = paint.filled(rock) + 16 * paint.clouds(rng, 5)[..., None] + 13 * paint.grain(rng)[..., None]
    mask = _pose(rng, glyph(class_name, "STIXGeneralBol"), 52, 78)
    depth = paint.alpha(paint.blurred(mask, 1.2))
    relief = np.roll(depth, (3, 3), (0, 1)) - np.roll(depth, (-3, -3), (0, 1))
    return canvas - 30 * depth[..., None] + 70 * relief[..., None]


# --- Known pairs of colours, as flags in the wind ------------------------------------------------------------------

FLAGS: tuple[str, ...] = (
    "red circle on a white", "yellow circle on a blue", "green circle on a pink", "orange circle on a purple",
    "white circle on a black", "blue circle on a red", "pink circle on a white", "black circle on a green",
    "purple circle on a gray",
)  # fmt: skip


def flag(rng: np.random.Generator, class_name: str) -> paint.Canvas:
    words = class_name.split()
    disc, cloth = words[0], words[-1]
    sky = paint.filled(np.asarray((150, 190, 225)) + rng.normal(0, 5, 3)) + 10 * paint.clouds(rng, 4)[..., None]
    phase, length, height = rng.uniform(0, 6), rng.uniform(26, 40), rng.uniform(2, 4)
    ripple = height * np.sin(_COLUMNS / length * 6.283 / 2 + phase)
    top, bottom, left = rng.uniform(8, 16), CANVAS_PX - rng.uniform(10, 20), 10
    inside = (_ROWS + ripple > top) & (_ROWS + ripple < bottom) & (left < _COLUMNS) & (_COLUMNS < CANVAS_PX - 3)
    canvas = paint.blend(sky, inside.astype(np.float32), paint.colour(rng, cloth))
    radius, middle = rng.uniform(20, 27), ((top + bottom) / 2, (left + CANVAS_PX) / 2 + rng.uniform(-6, 6))
    round_ = np.hypot(_ROWS + ripple - middle[0], _COLUMNS - middle[1]) < radius
    canvas = paint.blend(canvas, (round_ & inside).astype(np.float32), paint.colour(rng, disc))
    folds = np.cos(_COLUMNS / length * 6.283 / 2 + phase)
    canvas = canvas + 14 * (folds * inside)[..., None]
    pole = (_COLUMNS > 5) & (_COLUMNS < 9)
    return paint.blend(canvas, pole.astype(np.float32), np.asarray((90, 70, 50)))


# --- Gems on velvet, and planets: names that pre-training never read ------------------------------------------------

GEMS: dict[str, tuple[int, int, int]] = {
    "ruby": (190, 20, 50), "emerald": (20, 140, 80), "sapphire": (30, 60, 180), "topaz": (240, 180, 60),
    "amethyst": (140, 80, 190), "onyx": (30, 30, 34), "pearl": (238, 232, 222), "turquoise": (60, 190, 190),
    "garnet": (110, 20, 30), "rose quartz": (240, 170, 190),
}  # fmt: skip


def gem(rng: np.random.Generator, class_name: str) -> paint.Canvas:
    velvet = np.asarray((66, 58, 78)) + rng.normal(0, 5, 3)
    canvas = paint.filled(velvet) + 9 * paint.clouds(rng, 5)[..., None] + 3 * paint.grain(rng)[..., None]
    x, y = CANVAS_PX / 2 + rng.uniform(-9, 9, 2)
    radius, turn, num_facets = rng.uniform(26, 38), rng.uniform(0, 6.283), int(rng.integers(6, 10))
    angle = np.mod(np.arctan2(_ROWS - y, _COLUMNS - x) + turn, 6.283)
    distance = np.hypot(_ROWS - y, _COLUMNS - x)
    facet = np.floor(angle / 6.283 * num_facets)
    within = np.mod(angle, 6.283 / num_facets) - 3.1416 / num_facets
    edge = radius * np.cos(3.1416 / num_facets) / np.cos(within)
    light = rng.uniform(0.65, 1.35, num_facets + 1)[facet.astype(np.intp)]
    table = distance < 0.5 * edge
    shade = np.where(table, 1.15, light)[..., None]
    stone = np.clip((np.asarray(GEMS[class_name]) + rng.normal(0, 10, 3)) * shade + 14 * table[..., None], 0, 255)
    inside = (distance < edge)[..., None]
    return np.where(inside, stone, canvas).astype(np.float32)


PLANETS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "mercury": ((150, 145, 140), (110, 106, 104)), "venus": ((236, 214, 160), (216, 180, 110)),
    "terra": ((50, 110, 200), (70, 150, 80)), "mars": ((196, 84, 48), (150, 60, 40)),
    "jupiter": ((224, 196, 160), (170, 110, 76)), "uranus": ((150, 220, 224), (130, 206, 214)),
    "neptune": ((46, 72, 200), (36, 54, 160)), "pluto": ((214, 190, 176), (120, 80, 70)),
}  # fmt: skip


def planet(rng: np.random.Generator, class_name: str) -> paint.Canvas:
    canvas = paint.filled(np.asarray((6, 6, 12)) + rng.normal(0, 2, 3)) + 4 * paint.grain(rng)[..., None]
    x, y = CANVAS_PX / 2 + rng.uniform(-8, 8, 2)
    radius, tilt = rng.uniform(30, 42), rng.uniform(-0.4, 0.4)
    u, v = (_COLUMNS - x) / radius, (_ROWS - y) / radius
    bands = np.sin((v + tilt * u) * rng.uniform(7, 11) + 1.5 * paint.clouds(rng, 4)) > rng.uniform(-0.2, 0.4)
    first, second = (np.asarray(c) + rng.normal(0, 8, 3) for c in PLANETS[class_name])
    surface = np.where(bands[..., None], first, second)
    height = np.sqrt(np.clip(1 - u**2 - v**2, 0, 1))
    sunlight = np.clip(0.35 + 0.9 * (0.75 * height - 0.45 * u - 0.3 * v), 0.08, 1.15)
    disc = (u**2 + v**2 < 1)[..., None]
    return np.where(disc, surface * sunlight[..., None], canvas).astype(np.float32)


PAINTERS: dict[str, Callable[[np.random.Generator, str], paint.Canvas]] = {
    "notebook": notebook, "chessboard": chessboard, "night_sky": night_sky, "neon": neon_sign, "mist": mist,
    "stone": carved_stone, "flags": flag, "gems": gem, "planets": planet,
}  # fmt: skip
