"""How fast images are decoded: by the platform, and by other well-kept decoders, with what each changes of the pixels.

Each decodes the same files to 8-bit RGB in one thread; what counts is processor time, which other work on the machine
changes less than time by the clock. `draft` is Pillow's own shortcut for a model of `size_px`: a
JPEG decoded at half, a quarter or an eighth of its size, still at least the model's. Decoders that are not installed
are left out.
"""

from __future__ import annotations

import importlib
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from diki_ray.data.images import decode_image

Decoder = Callable[[bytes], np.ndarray]
FILES = (("JPEG", 64), ("JPEG", 500), ("JPEG", 2000), ("PNG", 64), ("PNG", 500))
COUNT = 4


def decoding(size_px: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of file and each decoder that takes it: images a second, the ratio to the platform's, and the
    largest and mean difference of a channel's value."""
    rows = []
    for image_format, size in FILES:
        files = [picture_file(seed, image_format, size) for seed in range(COUNT)]
        decoders = {name: d for name, d in known_decoders(size_px).items() if image_format == "JPEG" or name in ANY}
        seconds = _cpu_seconds(rounds, {name: _all(decode, files) for name, decode in decoders.items()})
        right = [decoders["platform"](data).astype(int) for data in files]
        for name, decode in decoders.items():
            found = [decode(data).astype(int) for data in files]
            alike = [f.shape == r.shape for f, r in zip(found, right, strict=True)]
            away = [np.abs(f - r) for f, r, same in zip(found, right, alike, strict=True) if same]
            rows.append(
                {
                    "file": f"{image_format}, {size} px",
                    "decoder": name,
                    "images_per_cpu_s": COUNT / seconds[name],
                    "ratio": seconds["platform"] / seconds[name],
                    "largest_difference": int(max(a.max() for a in away)) if all(alike) else "another size",
                    "mean_difference": float(np.mean([a.mean() for a in away])) if all(alike) else None,
                }
            )
    return rows


ANY = ("platform", "pillow", "torchvision")
"""Decoders of more than JPEG."""


def known_decoders(size_px: int) -> dict[str, Decoder]:
    from torchvision import io as torchvision_io

    def draft(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (size_px, size_px))
        return np.asarray(image.convert("RGB"))

    def torchvisions(data: bytes) -> np.ndarray:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return torchvision_io.decode_image(encoded, torchvision_io.ImageReadMode.RGB).permute(1, 2, 0).numpy()

    found: dict[str, Decoder] = {
        "platform": lambda data: np.asarray(decode_image(data)),
        "pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
        "pillow_draft": draft,
        "torchvision": torchvisions,
    }
    if (simplejpeg := _installed("simplejpeg")) is not None:
        found["simplejpeg"] = simplejpeg.decode_jpeg
        found["simplejpeg_fast"] = lambda data: simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True)
    if (turbojpeg := _installed("turbojpeg")) is not None:
        try:
            turbo = turbojpeg.TurboJPEG()
        except RuntimeError:  # the package is there, and the library that it wraps is not
            return found
        found["pyturbojpeg"] = lambda data: turbo.decode(data, pixel_format=turbojpeg.TJPF_RGB)
    return found


def picture_file(seed: int, image_format: str, size: int) -> bytes:
    """Edges, surfaces and some noise, as a photograph has."""
    random, out = np.random.default_rng(seed), io.BytesIO()
    coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(float)
    pixels = np.clip(smooth + random.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(out, image_format, **({"quality": 90} if image_format == "JPEG" else {}))
    return out.getvalue()


def _all(decode: Decoder, files: list[bytes]) -> Callable[[], list[np.ndarray]]:
    return lambda: [decode(data) for data in files]


def _cpu_seconds(rounds: int, acts: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The least of each act's rounds, which take turns."""
    best = dict.fromkeys(acts, float("inf"))
    for _ in range(rounds + 1):
        for name, act in acts.items():
            started = time.process_time()
            act()
            best[name] = min(best[name], time.process_time() - started)
    return best


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
