"""Folders of images that mean nothing and are the same each time they are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def draw(folder: Path, counts: Mapping[str, int], site: str) -> None:
    """Images of noise: so many of each class to train on, and one each to validate and to test."""
    for name, count in counts.items():
        for split, number in (("train", count), ("val", 1), ("test", 1)):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for n in range(number):
                seed = [sum(map(ord, site + name + split)), n]
                pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{site}{n}.png")
