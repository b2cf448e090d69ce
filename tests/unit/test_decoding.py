"""Decoding in processes that can be ended: hostile files, killed processes, and what is left afterwards."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from diki_ray.data.images import UndecodableImageError, decode_image
from diki_ray.prediction.run_predictor import Squares
from diki_ray.serving.decoding import Decoder, DecodingTooSlowError

TIMEOUT_S = 1.5


OF_OTHER_TESTS: set[int] = set()
"""Decoders of servers that other files' tests have had in this process."""


@pytest.fixture(autouse=True)
def count_anew() -> None:
    OF_OTHER_TESTS.clear()
    OF_OTHER_TESTS.update(children())


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    decoder = Decoder(2, TIMEOUT_S)
    yield decoder
    decoder.close()
    assert children() == []


@pytest.mark.parametrize(("height", "width"), [(90, 40), (31, 64), (48, 48), (20, 599), (599, 20)])
def test_images_are_scaled_as_the_model_would_scale_them(height: int, width: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    preprocess = open_clip.image_transform(48, is_train=False)
    squares = Squares.of(preprocess)
    assert squares is not None
    assert squares.size_px == 48
    decoder = Decoder(1, TIMEOUT_S, 48)
    try:
        decoded = decoder.decode(out.getvalue(), 100_000)
    finally:
        decoder.close()
    image = decoded.image
    assert (decoded.width, decoded.height) == (width, height)
    assert image.size == decoded.size == (48, 48)
    assert torch.equal(preprocess(image), preprocess(Image.fromarray(noise)))
    several = squares.pixels([image.tobytes()] * 2)
    assert several.is_contiguous()
    assert torch.equal(several[1], preprocess(image))


def test_a_line_of_pixels_and_what_another_preprocessing_gets_are_not_scaled() -> None:
    decoder = Decoder(1, TIMEOUT_S, 48)
    try:
        out = io.BytesIO()
        Image.new("RGB", (3_200, 100)).save(out, "PNG")
        assert decoder.decode(out.getvalue(), 10**6).image.size == (3_200, 100)
    finally:
        decoder.close()
    squeezing = transforms.Compose([transforms.Resize((48, 48)), transforms.ToTensor()])
    bilinear = transforms.Compose([transforms.Resize(48), transforms.CenterCrop(48), transforms.ToTensor()])
    oblong = transforms.Compose([transforms.Resize((48, 32)), transforms.ToTensor()])

    def reducing(image: Image.Image) -> torch.Tensor:
        image.thumbnail((512, 512))
        return open_clip.image_transform(224, is_train=False)(image)

    def refusing(image: Image.Image) -> torch.Tensor:
        raise ValueError("not such an image")

    def blurring(image: Image.Image) -> torch.Tensor:
        return functional.gaussian_blur(open_clip.image_transform(48, is_train=False)(image), [3, 3])

    others = (squeezing, bilinear, oblong, reducing, refusing, blurring, np.asarray)
    assert [Squares.of(other) for other in others] == [None] * 7
    found = Squares.of(open_clip.image_transform(224, is_train=False))
    assert found is not None
    assert found.size_px == 224


def children() -> list[int]:
    """Process ids of the decoders that a test has started and not ended."""
    listed = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True)
    decoders = [line for line in listed.stdout.splitlines() if "diki_ray.serving.decoding" in line]
    return [pid for pid in (int(line.split()[0]) for line in decoders) if pid not in OF_OTHER_TESTS]


def file_of(seed: int, size: int = 40, image_format: str = "PNG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size + 3, 3), np.uint8)
    Image.fromarray(pixels).save(out, image_format)
    return out.getvalue()


def progressive(num_scans: int) -> bytes:
    """A progressive JPEG that says the same scan over and over: each makes the decoder pass over all its pixels."""
    out = io.BytesIO()
    Image.new("RGB", (4000, 4000), "red").save(out, "JPEG", progressive=True)
    data = out.getvalue()
    start = data.rindex(b"\xff\xda")  # the last scan, a refinement
    end = data.rindex(b"\xff\xd9")
    return data[:start] + data[start:end] * num_scans + data[end:]


def test_images_are_those_of_decode_image(decoder: Decoder) -> None:
    files = [file_of(n, image_format=kind) for n, kind in enumerate(("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"))] * 4
    with ThreadPoolExecutor(2) as pool:
        images = list(pool.map(lambda data: decoder.decode(data, 10_000).image, files))
    for image, data in zip(images, files, strict=True):
        expected = decode_image(data, 10_000)
        assert (image.mode, image.size) == ("RGB", expected.size)
        assert image.tobytes() == expected.tobytes()
    assert len(children()) == 2


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "not an image"), (b"words", "not an image"), (file_of(1, 200), "too many pixels")]
)
def test_reasons_are_those_of_decode_image(decoder: Decoder, data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableImageError) as told:
        decoder.decode(data, 10_000)
    assert told.value.reason == reason
    assert decoder.decode(file_of(2), 10_000).image.size == (43, 40)


def test_an_image_that_would_take_minutes_is_ended_at_its_time_and_the_next_is_decoded(decoder: Decoder) -> None:
    """Two of them, so that both processes have one, in a file of 150 KB each."""
    hostile = progressive(3000)

    def seconds_of(data: bytes) -> float:
        started = time.monotonic()
        with pytest.raises((DecodingTooSlowError, UndecodableImageError)):
            decoder.decode(data, 25_000_000)
        return time.monotonic() - started

    with ThreadPoolExecutor(2) as pool:
        assert max(pool.map(seconds_of, [hostile, hostile])) < TIMEOUT_S + 5  # starting a process is not counted
    assert decoder.decode(file_of(4), 10_000).image.size == (43, 40)


def test_a_process_that_stands_still_or_is_killed_is_replaced(decoder: Decoder) -> None:
    for number in (signal.SIGSTOP, signal.SIGKILL):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda data: decoder.decode(data, 10_000), [file_of(3)] * 4))
        former = children()
        for child in former:
            os.kill(child, number)
        for _ in former:
            with suppress(DecodingTooSlowError):  # each is found out at most once
                decoder.decode(file_of(4), 10_000)
        assert decoder.decode(file_of(4), 10_000).image.size == (43, 40)
        assert not set(former) & set(children())


def test_a_process_ends_with_its_parent() -> None:
    code = """
import os, signal
from diki_ray.serving.decoding import Decoder
decoder = Decoder(1, 5)
try:
    decoder.decode(b"", 9)
except Exception:
    child = decoder._free.get()
print(child.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    child = int(done.stdout)
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{child}")
