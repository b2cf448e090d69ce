"""Bytes to pixels: one function that every image goes through, and the reasons it may refuse one.

Pillow guesses formats from the bytes and knows dozens, one of which (EPS) starts another program; only those that
image data sets use are tried. The pixel limit is checked on the header, before memory is taken, and the scans of a
JPEG are counted before any is decoded: each is a pass over all its pixels, and takes ten bytes to write down.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diki_ray.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm"})
"""File extensions, lower case, that are images to us; shards hold nothing else beside labels."""

MAX_PIXELS = 89_478_485
"""Where Pillow begins to warn of decompression bombs; decoded that is 256 MiB."""

MAX_JPEG_SCANS = 100
"""As libtiff has it. Encoders write about ten; 2,000 fit into 130 KB and take ten seconds."""

_EXIF_ORIENTATION = 0x0112
_SCAN, _END = 0xDA, 0xD9
_SEGMENT = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # but for the markers that no length follows
_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
_FILL = b"\xff" * 65_536
_MAX_SEGMENTS = 10_000  # of a file that may have many scans: no encoder writes a hundredth, and each takes a step here


class UndecodableImageError(DataError):
    """An image that is skipped; `reason` is one of few short phrases, fit for counting."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to 8-bit RGB, upright.

    EXIF rotation is applied; transparency is laid on white; CMYK, palettes and grey are converted; 16 bits are scaled
    to 8 instead of being cut off. Of an animation the first frame is taken.

    Raises UndecodableImageError: "not an image", "truncated image", "too many pixels", "too many scans", "unsupported
    pixel format".
    """
    _check_jpeg(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise UndecodableImageError("not an image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UndecodableImageError("too many pixels", str(error)) from None
    except Exception as error:  # a damaged header can raise almost anything from Pillow's parsers
        raise UndecodableImageError("not an image", repr(error)) from None
    if image.width * image.height > max_pixels:
        raise UndecodableImageError("too many pixels", f"{image.width}x{image.height}, allowed are {max_pixels}")
    try:
        image.load()
        return _to_rgb(_upright(image))
    except UndecodableImageError:
        raise
    except Exception as error:  # likewise from its decoders: OSError, SyntaxError, struct.error, EOFError, ValueError
        raise UndecodableImageError("truncated image", repr(error)) from None


def image_of(value: Any) -> Image.Image:
    """An image as Python has it, as the RGB image that `decode_image` makes of its file.

    value: a PIL image; an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; or a torch tensor, with its channels
        first. Arrays and tensors hold uint8, or floats from 0 to 1.

    Raises:
        DataError: anything else.
    """
    image = value if isinstance(value, Image.Image) else Image.fromarray(_pixels(value))
    upright = ImageOps.exif_transpose(image) or image
    if upright.mode == "RGB" and not upright.has_transparency_data:
        return upright
    # The one decoder that files go through decides what becomes of transparency, palettes and 16 bits.
    buffer = io.BytesIO()
    (upright if upright.mode in _PNG_MODES else upright.convert("RGB")).save(buffer, "PNG", compress_level=0)
    try:
        return decode_image(buffer.getvalue())
    except UndecodableImageError as error:
        raise DataError(f"an image of mode {image.mode} cannot be used: {error}.") from None


def _pixels(value: Any) -> np.ndarray:
    """uint8 [H, W], [H, W, 3] or [H, W, 4]."""
    channels_first = hasattr(value, "detach")
    array = value.detach().cpu().numpy() if channels_first else np.asarray(value)
    if channels_first and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise DataError(
            f"a {type(value).__name__} of shape {array.shape} is no image: give PIL images, arrays of height, width "
            "and 1, 3 or 4 channels, or tensors with their channels first."
        )
    if array.dtype.kind == "f" and array.min() >= 0 and array.max() <= 1:
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise DataError(
            f"an image of {array.dtype} from {array.min()} to {array.max()} has no known range: give bytes (uint8), or "
            "floats from 0 to 1, as they are before a model's normalisation."
        )
    return np.ascontiguousarray(array)


def _check_jpeg(data: bytes) -> None:
    """Raises UndecodableImageError for a JPEG whose decoding would take far longer than its pixels need: many scans, or
    long runs of fill bytes, over which libjpeg goes anew with every block it is fed. Follows its markers as libjpeg
    does, to the end of the image; what lies behind that (the film of a photograph that moves) is not read."""
    if not data.startswith(b"\xff\xd8"):
        return
    read = np.frombuffer(data, np.uint8)  # bytes.count takes four times as long
    may_be_scans = np.count_nonzero((read[:-1] == 0xFF) & (read[1:] == _SCAN))
    # A run as long as _FILL has one byte in each of these places.
    if may_be_scans <= MAX_JPEG_SCANS and not (0xFF in data[len(_FILL) - 1 :: len(_FILL)] and _FILL in data):
        return
    num_scans, position = 0, 2
    for _ in range(_MAX_SEGMENTS):
        found = _SEGMENT.search(data, position)
        if data.find(_FILL, position, found.start() if found else len(data)) >= 0:
            raise UndecodableImageError("truncated image", "a JPEG with fill bytes in place of an image")
        if found is None or found[1][0] == _END:
            return
        num_scans += found[1][0] == _SCAN
        if num_scans > MAX_JPEG_SCANS:
            break
        position = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
    raise UndecodableImageError("too many scans", f"a JPEG of more than {MAX_JPEG_SCANS}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata beside good pixels: the pixels count
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise UndecodableImageError("unsupported pixel format", "floating point pixels have no agreed range")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.size and (levels.min() < 0 or levels.max() > 65535):
            raise UndecodableImageError("unsupported pixel format", "more than 16 bits a channel")
        # Rounded division by 257 takes 65535 to 255; Pillow's own conversion clips everything above 255 to white.
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def at_size(image: Image.Image, size_px: int) -> Image.Image:
    """CLIP's resize (bicubic, shorter side) and centre crop, once: the pixels that torchvision's transforms make, which
    take longer to import than an image to be decoded."""
    short, long = sorted(image.size)
    if short != size_px:
        other = int(size_px * long / short)
        size = (size_px, other) if image.width <= image.height else (other, size_px)
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - size_px) / 2) for side in image.size)
    return image.crop((left, top, left + size_px, top + size_px))


def at_model_size(image: Image.Image, size_px: int, image_format: str) -> tuple[bytes, str]:
    """An image at a model's size: an image file ("png" or "jpeg") and its extension.

    A model that does the same afterwards gets the same pixels from a PNG as from the original; JPEG (quality 95, full
    colour resolution) takes 0.4 of its space (photographs at 64 and 112 px) and differs a little.
    """
    out = io.BytesIO()
    if image_format == "png":
        at_size(image, size_px).save(out, "PNG")
        return out.getvalue(), "png"
    at_size(image, size_px).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue(), "jpg"
