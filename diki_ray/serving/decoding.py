"""Images are decoded in processes that can be ended: nothing else ends a decoder of C that was given a hostile file.

A child (`python -m diki_ray.serving.decoding`) knows Pillow alone. It scales images to the model's size as well, so
that the process of the model has neither this work nor all of their pixels. It is asked over its standard input and
answers on its standard output: lengths and bytes. It ends with its input, and at its own alarm where nobody is left to
end it.
"""

from __future__ import annotations

import os
import queue
import selectors
import signal
import struct
import subprocess
import sys
import time
import warnings
from typing import BinaryIO, NamedTuple

from PIL import Image

from diki_ray.data.images import UndecodableImageError, at_size, decode_image

_ASK = struct.Struct("<QQdI")  # bytes of the file, pixels that it may have, seconds that it may take, size or 0
_REPLY = struct.Struct("<BQIIII")  # whether it is an image, bytes, width, height, and those of the file
_CHUNK = 2**20
MAX_SCALED_RATIO = 30
"""Images whose sides differ more are not scaled."""


class DecodingTooSlowError(Exception):
    """The image was not decoded in time, or its process died of it; the process is ended."""


class Decoded(NamedTuple):
    """An image's RGB bytes and its size, and the width and height that it had, upright, before it was scaled."""

    rgb: bytes
    size: tuple[int, int]
    width: int
    height: int

    @property
    def image(self) -> Image.Image:
        return Image.frombytes("RGB", self.size, self.rgb)


class Decoder:
    """Decodes in up to `processes` processes at once, which are started when first needed. With `size_px` they scale
    and crop images to this square, too (`at_size`)."""

    def __init__(self, processes: int, timeout_s: float, size_px: int | None = None) -> None:
        self._timeout_s, self.size_px = timeout_s, size_px
        self._free: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()
        for _ in range(processes):
            self._free.put(None)

    def decode(self, data: bytes, max_pixels: int) -> Decoded:
        """Returns the image, 8-bit RGB and upright, and at `size_px` where there is one. Called by as many threads as
        there are processes.

        Raises:
            UndecodableImageError: as decode_image does. DecodingTooSlowError: it took longer than it may.
        """
        child = self._free.get()
        try:
            if child is None or child.process.poll() is not None:
                child = _Child()
            try:
                return child.decode(data, max_pixels, self._timeout_s, self.size_px or 0)
            except (TimeoutError, OSError, EOFError) as error:
                child.end()
                child = None
                raise DecodingTooSlowError from error
        finally:
            self._free.put(child)

    def close(self) -> None:
        """Ends the processes that are free; those at work end with their input."""
        while not self._free.empty():
            if (child := self._free.get()) is not None:
                child.end()


class _Child:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "diki_ray.serving.decoding"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            bufsize=0,
        )
        _read(self._output(), 1, time.monotonic() + 60)  # it has imported what it needs

    def decode(self, data: bytes, max_pixels: int, timeout_s: float, size_px: int) -> Decoded:
        deadline = time.monotonic() + timeout_s
        self._input().write(_ASK.pack(len(data), max_pixels, timeout_s, size_px))
        view = memoryview(data)
        while view:
            view = view[self._input().write(view[:_CHUNK]) :]
        is_image, length, *sizes = _REPLY.unpack(_read(self._output(), _REPLY.size, deadline))
        reply = _read(self._output(), length, deadline)
        if not is_image:
            reason, _, detail = reply.decode().partition("\0")
            raise UndecodableImageError(reason, detail)
        return Decoded(bytes(reply), (sizes[0], sizes[1]), sizes[2], sizes[3])

    def end(self) -> None:
        self.process.kill()
        self._input().close()
        self._output().close()
        self.process.wait()

    def _input(self) -> BinaryIO:
        assert self.process.stdin is not None
        return self.process.stdin  # type: ignore[return-value]

    def _output(self) -> BinaryIO:
        assert self.process.stdout is not None
        return self.process.stdout  # type: ignore[return-value]


def _read(file: BinaryIO, length: int, deadline: float = float("inf")) -> bytearray:
    """Raises TimeoutError at the deadline, EOFError where the file ends before."""
    read = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while len(read) < length:
            left = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
            if not selector.select(left):
                raise TimeoutError
            part = os.read(file.fileno(), min(_CHUNK, length - len(read)))
            if not part:
                raise EOFError
            read += part
    return read


def _answer(data: bytes, max_pixels: int, size_px: int) -> tuple[bytes, bytes]:
    try:
        image = decode_image(data, max_pixels)
    except UndecodableImageError as error:
        said = f"{error.reason}\0{error}".encode()
        return _REPLY.pack(False, len(said), 0, 0, 0, 0), said
    # A line of pixels would become a huge image, so it is left as it is; by default whoever asks refuses it.
    fits = size_px and max(image.size) <= MAX_SCALED_RATIO * min(image.size)
    scaled = at_size(image, size_px) if fits else image
    pixels = scaled.tobytes()
    return _REPLY.pack(True, len(pixels), *scaled.size, *image.size), pixels


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the parent ends in order, and its children with it
    warnings.filterwarnings("ignore", module="PIL")  # its remarks on odd files, of which strangers may send many
    with open(0, "rb", buffering=0) as asked, open(1, "wb") as answers:
        answers.write(b"+")
        answers.flush()
        while True:
            try:
                length, max_pixels, timeout_s, size_px = _ASK.unpack(_read(asked, _ASK.size))
                data = bytes(_read(asked, length))
            except EOFError:
                return
            signal.setitimer(signal.ITIMER_REAL, timeout_s + 1)  # its default action ends the process, also in C
            for part in _answer(data, max_pixels, size_px):
                answers.write(part)
            answers.flush()
            signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
