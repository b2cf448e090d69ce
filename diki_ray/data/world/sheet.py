"""The contact sheet of the embedded world that the documentation shows.

python -m diki_ray.data.world.sheet docs/images/embedded_world.png
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from diki_ray.data.world import tasks as world

_COLUMNS = 12
_PRETRAINING_ROWS = 3
_GAP_PX = 3
_LABEL_PX = 88
# A picture of pixels needs few colours, and the documentation stays light.
_NUM_COLOURS = 256


def rows() -> list[tuple[str, list[Image.Image]]]:
    """(label, pictures) of each row: the tasks in stream order, then pre-training."""
    tasks = [(name, [picture for picture, _ in world.samples(name, "val", _COLUMNS)]) for name in world.TASKS]
    pairs = world.pretraining_pairs(seed=0, num_pairs=_COLUMNS * _PRETRAINING_ROWS)
    pretraining = [
        ("pre-training" if row == 0 else "", [picture for picture, _ in islice(pairs, _COLUMNS)])
        for row in range(_PRETRAINING_ROWS)
    ]
    return tasks + pretraining


def contact_sheet() -> Image.Image:
    """One row a task and a few rows of pre-training pictures, labelled."""
    cell = world.IMAGE_SIZE_PX + _GAP_PX
    labelled = rows()
    sheet = Image.new("RGB", (_LABEL_PX + _COLUMNS * cell, len(labelled) * cell + _GAP_PX), "white")
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 12)
    draw = ImageDraw.Draw(sheet)
    for row, (label, pictures) in enumerate(labelled):
        top = _GAP_PX + row * cell
        draw.text((4, top + world.IMAGE_SIZE_PX // 2), label, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (_LABEL_PX + column * cell, top))
    return sheet


if __name__ == "__main__":
    sheet = contact_sheet().quantize(
        _NUM_COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE
    )
    sheet.save(sys.argv[1], optimize=True)
