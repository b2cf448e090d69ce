"""How the embedded world is painted: colours, grounds, and the styles an emblem is drawn in.

A *ground* fills the canvas, a *style* puts an emblem's mask on it. Canvases are float32 `[CANVAS_PX, CANVAS_PX, 3]` in
0..255. All randomness comes from the generator passed in, so a picture is a function of its seed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from diki_ray.data.world.emblems import CANVAS_PX

Canvas = np.ndarray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40), "orange": (242, 132, 30), "yellow": (246, 214, 50), "green": (46, 160, 67),
    "blue": (40, 92, 214), "purple": (128, 52, 168), "pink": (248, 134, 186), "brown": (121, 76, 42),
    "black": (22, 22, 24), "white": (246, 246, 244), "gray": (138, 140, 144),
}  # fmt: skip

_ROWS, _COLUMNS = np.mgrid[0:CANVAS_PX, 0:CANVAS_PX].astype(np.float32)


def colour(rng: np.random.Generator, name: str, spread: float = 12.0) -> np.ndarray:
    """An RGB value that still deserves its name."""
    return np.clip(np.asarray(COLOURS[name], np.float32) + rng.normal(0, spread, 3).astype(np.float32), 0, 255)


def filled(rgb: np.ndarray) -> Canvas:
    """A canvas of one colour."""
    return np.broadcast_to(np.asarray(rgb, np.float32), (CANVAS_PX, CANVAS_PX, 3)).copy()


def clouds(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise in about -1..1 with `cells` bumps a side: `[CANVAS_PX, CANVAS_PX]`."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((CANVAS_PX, CANVAS_PX), Image.Resampling.BICUBIC))


def grain(rng: np.random.Generator) -> np.ndarray:
    """White noise of unit variance: `[CANVAS_PX, CANVAS_PX]`."""
    return rng.standard_normal((CANVAS_PX, CANVAS_PX), np.float32)


def alpha(mask: Image.Image) -> np.ndarray:
    """A mask as opacity 0..1: `[CANVAS_PX, CANVAS_PX]`."""
    return np.asarray(mask, np.float32) / 255


def blend(canvas: Canvas, opacity: np.ndarray, rgb: np.ndarray) -> Canvas:
    """`rgb` (a colour or a canvas) over `canvas` where `opacity` says so."""
    return canvas + opacity[..., None] * (np.asarray(rgb, np.float32) - canvas)


def blurred(mask: Image.Image, radius_px: float) -> Image.Image:
    return mask.filter(ImageFilter.GaussianBlur(radius_px))


def rim(mask: Image.Image, width_px: int) -> np.ndarray:
    """Opacity of a line `width_px` (odd, plus the edge itself) wide just inside the figure."""
    return alpha(mask) - alpha(mask.filter(ImageFilter.MinFilter(width_px)))


def waves(rng: np.random.Generator, period_px: float, angle: float) -> np.ndarray:
    """A sine of the given period and direction in -1..1, at a random phase."""
    phase = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * _COLUMNS + np.sin(angle) * _ROWS
    return np.sin(2 * np.pi * along / period_px + phase)


# --- Grounds of the pre-training pictures -------------------------------------------------------------------------


def _plain(rng: np.random.Generator, rgb: np.ndarray) -> Canvas:
    return filled(rgb)


def _shaded(rng: np.random.Generator, rgb: np.ndarray) -> Canvas:
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (np.cos(angle) * (_COLUMNS - CANVAS_PX / 2) + np.sin(angle) * (_ROWS - CANVAS_PX / 2)) / CANVAS_PX
    return filled(rgb) + 90 * ramp[..., None]


def _figured(rgb: np.ndarray, where: np.ndarray, contrast: float) -> Canvas:
    """A two-tone pattern: the colour itself, and a darker (for dark colours a lighter) tone of it."""
    tone = rgb * (1 - contrast) if rgb.mean() > 70 else rgb + 255 * contrast * 0.6
    return blend(filled(rgb), where, tone)


def _striped(rng: np.random.Generator, rgb: np.ndarray) -> Canvas:
    where = np.clip(4 * waves(rng, rng.uniform(9, 20), rng.uniform(0, np.pi)) + 0.5, 0, 1)
    return _figured(rgb, where, rng.uniform(0.15, 0.4))


def _dotted(rng: np.random.Generator, rgb: np.ndarray) -> Canvas:
    period, angle = rng.uniform(11, 20), rng.uniform(0, np.pi / 2)
    where = waves(rng, period, angle) + waves(rng, period, angle + np.pi / 2)
    return _figured(rgb, np.clip(4 * (where - 0.8), 0, 1), rng.uniform(0.2, 0.45))


def _checked(rng: np.random.Generator, rgb: np.ndarray) -> Canvas:
    period, angle = rng.uniform(18, 32), rng.choice([0, np.pi / 4])
    where = waves(rng, period, angle) * waves(rng, period, angle + np.pi / 2)
    return _figured(rgb, np.clip(20 * where + 0.5, 0, 1), rng.uniform(0.12, 0.35))


def _noisy(rng: np.random.Generator, rgb: np.ndarray) -> Canvas:
    return filled(rgb) + rng.uniform(12, 34) * grain(rng)[..., None]


def _cloudy(rng: np.random.Generator, rgb: np.ndarray) -> Canvas:
    return filled(rgb) + rng.uniform(20, 48) * clouds(rng, int(rng.integers(4, 9)))[..., None]


GROUNDS: dict[str, Callable[[np.random.Generator, np.ndarray], Canvas]] = {
    "plain": _plain, "shaded": _shaded, "striped": _striped, "dotted": _dotted, "checked": _checked,
    "noisy": _noisy, "cloudy": _cloudy,
}  # fmt: skip


# --- Styles of the pre-training pictures --------------------------------------------------------------------------


def _solid(rng: np.random.Generator, canvas: Canvas, mask: Image.Image, rgb: np.ndarray) -> Canvas:
    return blend(canvas, alpha(mask), rgb)


def _outlined(rng: np.random.Generator, canvas: Canvas, mask: Image.Image, rgb: np.ndarray) -> Canvas:
    return blend(canvas, rim(mask, int(rng.choice([5, 7]))), rgb)


def _hatched(rng: np.random.Generator, canvas: Canvas, mask: Image.Image, rgb: np.ndarray) -> Canvas:
    lines = np.clip(4 * waves(rng, rng.uniform(6, 10), rng.uniform(0, np.pi)) + 1, 0, 1)
    return blend(canvas, np.maximum(alpha(mask) * lines, rim(mask, 3)), rgb)


def _spotted(rng: np.random.Generator, canvas: Canvas, mask: Image.Image, rgb: np.ndarray) -> Canvas:
    period, angle = rng.uniform(7, 11), rng.uniform(0, np.pi / 2)
    dots = np.clip(3 * (waves(rng, period, angle) + waves(rng, period, angle + np.pi / 2)) + 1, 0.15, 1)
    return blend(canvas, alpha(mask) * dots, rgb)


def _chalk(rng: np.random.Generator, canvas: Canvas, mask: Image.Image, rgb: np.ndarray) -> Canvas:
    strokes = waves(rng, rng.uniform(5, 9), rng.uniform(0.4, 1.1)) + 0.9 * grain(rng)
    return blend(canvas, np.maximum(alpha(mask), rim(mask, 3)) * np.clip(0.6 + 0.5 * strokes, 0, 1), rgb)


def _blurry(rng: np.random.Generator, canvas: Canvas, mask: Image.Image, rgb: np.ndarray) -> Canvas:
    return blend(canvas, np.clip(1.15 * alpha(blurred(mask, rng.uniform(2, 4))), 0, 1), rgb)


def _sticker(rng: np.random.Generator, canvas: Canvas, mask: Image.Image, rgb: np.ndarray) -> Canvas:
    border = alpha(mask.filter(ImageFilter.MaxFilter(9)))
    edge = (252.0,) * 3 if rgb.mean() < 200 else (30.0,) * 3
    return blend(blend(canvas, border, np.asarray(edge)), alpha(mask), rgb)


def _shadowed(rng: np.random.Generator, canvas: Canvas, mask: Image.Image, rgb: np.ndarray) -> Canvas:
    shadow = np.roll(alpha(blurred(mask, 2.5)), (6, 5), (0, 1))
    return blend(blend(canvas, 0.6 * shadow, np.zeros(3)), alpha(mask), rgb)


STYLES: dict[str, Callable[[np.random.Generator, Canvas, Image.Image, np.ndarray], Canvas]] = {
    "solid": _solid, "outlined": _outlined, "hatched": _hatched, "spotted": _spotted, "chalk": _chalk,
    "blurry": _blurry, "sticker": _sticker, "shadowed": _shadowed,
}  # fmt: skip


def finished(canvas: Canvas, size_px: int) -> Image.Image:
    """The delivered picture: 8-bit RGB, box-filtered to `size_px`."""
    picture = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    return picture.resize((size_px, size_px), Image.Resampling.BOX)
