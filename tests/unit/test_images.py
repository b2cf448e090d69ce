"""Images come out as upright 8-bit RGB, or are refused with a reason that can be counted."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diki_ray.data.images import UndecodableImageError, decode_image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def gradient(mode: str = "RGB") -> Image.Image:
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[..., 0] = np.arange(24) * 10
    pixels[:8, :, 1] = 200
    return Image.fromarray(pixels).convert(mode)


def test_rgb_png_keeps_its_pixels():
    assert np.array_equal(np.asarray(decode_image(encoded(gradient()))), np.asarray(gradient()))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA"])
def test_every_png_mode_becomes_rgb(mode):
    image = gradient("RGBA").convert(mode) if mode != "P" else gradient().quantize(16)
    decoded = decode_image(encoded(image))
    assert decoded.mode == "RGB"
    assert decoded.size == (24, 16)
    assert np.array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_has_the_colours_that_were_meant():
    red = Image.new("RGB", (16, 16), (200, 30, 30))
    decoded = np.asarray(decode_image(encoded(red.convert("CMYK"), "JPEG", quality=95)))
    assert np.abs(decoded.astype(int) - (200, 30, 30)).max() < 12


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(decode_image(encoded(clear))).min() == 255
    palette = gradient().quantize(4)
    assert decode_image(encoded(palette, transparency=0)).mode == "RGB"


def test_sixteen_bit_grey_is_scaled_not_cut_off():
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(levels))))
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floating_point_pixels_are_refused():
    data = encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    with pytest.raises(UndecodableImageError) as refusal:
        decode_image(data)
    assert refusal.value.reason == "unsupported pixel format"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = gradient()
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if undo is None else upright.transpose(undo)
    assert np.array_equal(np.asarray(decode_image(encoded(stored, exif=exif))), np.asarray(upright))


def test_damaged_exif_does_not_cost_the_image():
    data = encoded(gradient(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert decode_image(data).size == (24, 16)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_truncated_image_is_refused(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(UndecodableImageError) as refusal:
        decode_image(data[: len(data) // 2])
    assert refusal.value.reason in ("truncated image", "not an image")


def test_a_bomb_is_refused_before_it_takes_memory():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    for side in (12_000, 60_000):  # above our limit, above Pillow's own
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
        with pytest.raises(UndecodableImageError) as refusal:
            decode_image(bomb + chunk(b"IEND", b""))
        assert refusal.value.reason == "too many pixels"


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg></svg>", b"GIF89a"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(UndecodableImageError) as refusal:
        decode_image(data)
    assert refusal.value.reason == "not an image"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_images_decode_or_are_refused(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "PPM"]))
    original = bytearray(encoded(gradient(), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UndecodableImageError):
        assert decode_image(bytes(original)).mode == "RGB"
