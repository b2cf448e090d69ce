"""Images come out as upright 8-bit RGB, or are refused with a reason that can be counted."""

import contextlib
import io
import struct
import time
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


def with_scans(num_scans: int, size_px: int = 512) -> bytes:
    """A progressive JPEG of a picture, its second scan repeated until there are so many."""
    file = encoded(gradient().resize((size_px, size_px)), "JPEG", progressive=True)
    starts = [i for i in range(len(file)) if file[i : i + 2] == b"\xff\xda"]
    repeated = file[starts[-1] : -2]  # a scan that refines: libjpeg takes it any number of times
    return file[:-2] + repeated * (num_scans - len(starts)) + b"\xff\xd9"


class TestScans:
    @pytest.mark.parametrize("num_scans", [101, 2_000, 20_000])
    def test_a_jpeg_of_many_scans_is_refused_at_once(self, num_scans):
        attack = with_scans(num_scans)
        started = time.perf_counter()
        with pytest.raises(UndecodableImageError) as refusal:
            decode_image(attack)
        assert refusal.value.reason == "too many scans"
        assert time.perf_counter() - started < 0.5

    def test_the_attack_is_one(self):
        """Pillow itself takes every scan, at a cost that grows with their number."""

        def seconds(num_scans: int) -> float:
            started = time.perf_counter()
            Image.open(io.BytesIO(with_scans(num_scans))).load()
            return time.perf_counter() - started

        few_s, many_s = (min(seconds(number) for _ in range(3)) for number in (10, 2_000))
        assert many_s > 10 * few_s

    @pytest.mark.parametrize("padding", [b"\xff", b"\xff" * 50])
    def test_filled_markers_hide_no_scans(self, padding):
        with pytest.raises(UndecodableImageError, match="too many scans"):
            decode_image(with_scans(200).replace(b"\xff\xda", padding + b"\xff\xda"))

    def test_scans_behind_restart_markers_and_comments_are_counted(self):
        comment = b"\xff\xfe\x00\x06\xff\xd9\xff\xd9"  # a comment that looks like the end
        with pytest.raises(UndecodableImageError, match="too many scans"):
            decode_image(with_scans(200).replace(b"\xff\xda", b"\xff\xd0" + comment + b"\xff\xda"))

    def test_a_jpeg_of_ten_scans_is_decoded(self):
        assert np.asarray(decode_image(with_scans(10, 64))).shape == (64, 64, 3)

    def test_what_looks_like_scans_behind_the_end_or_in_a_comment_is_none(self):
        file = encoded(gradient(), "JPEG")
        noise = b"\xff\xda" * 1000
        assert decode_image(file + noise).size == (24, 16)  # as the film behind a photograph that moves
        comment = b"\xff\xfe" + (len(noise) + 2).to_bytes(2, "big") + noise
        assert decode_image(file[:2] + comment + file[2:]).size == (24, 16)

    @pytest.mark.parametrize("filling", [b"\xff", b"\xff\xd0", b"\xff\xfe\x00\x02", b"\xff\xff\x00"])
    def test_counting_is_quick_whatever_there_is_to_count(self, filling):
        start = with_scans(2, 64)[:-2]
        hidden = b"\xff\xfe\xff\xf0" + b"\xff\xda" * 32_759
        started = time.perf_counter()
        with contextlib.suppress(UndecodableImageError):
            decode_image(start + hidden + filling * (16_000_000 // len(filling)))
        assert time.perf_counter() - started < 2

    def test_a_photograph_padded_with_fill_bytes_behind_its_end_is_decoded(self):
        assert decode_image(encoded(gradient(), "JPEG") + b"\xff" * 200_000).size == (24, 16)
