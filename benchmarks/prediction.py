"""Batch prediction from image files on disk, against the predictor alone, in as many processes of one thread: one that
is given decoded images, and one that reads and decodes the same files itself.

python -m benchmarks.prediction STORAGE RUN BACKBONE SECONDS [FOLDER]   prints the predictor's images a second
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.decoding import picture_file
from benchmarks.serving import ROOT, RUN, picture_module, stored
from benchmarks.world import TEMPLATE, World
from diki_ray.data.images import decode_image
from diki_ray.prediction.batch_worker import IMAGES_PER_PASS, Learnt
from diki_ray.runs.stored_run import told_config

FILES = 256
"""So many files differ; the others are links to them."""
SIZES = (64, 500)
"""Pixels of a JPEG's sides."""
WORKERS = (1, 2)


def prediction(
    world: World, num_tasks: int, num_classes: int, images: int, seconds: float, rounds: int
) -> Iterator[dict[str, Any]]:
    """A row for each size and number of workers: medians of rounds, in each of which both predictors and the job take
    turns.

    A worker on a GPU has one of its own, so there are no more workers than GPUs.
    """
    most = torch.cuda.device_count() if world.device == "cuda" else max(WORKERS)
    modules = [picture_module(world, task, num_classes) for task in range(num_tasks)]
    for size in SIZES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            settings = stored(world, folder, modules, "classes")
            _write(folder / "images", size, images)
            for workers in (n for n in WORKERS if n <= most):
                run = [settings.storage, RUN, str(settings.backbone)]
                alone = [*run, str(seconds)]
                turns = [
                    (
                        _alone(alone, workers),
                        _alone([*alone, str(folder / "images")], workers),
                        *_job(folder, run, workers),
                    )
                    for _ in range(rounds)
                ]
                given, reading, rate, share = map(median, zip(*turns, strict=True))
                row = {"jpeg_px": size, "workers": workers, "images_per_s": rate, "of_predictor": rate / given}
                row |= {"of_predictor_reading": rate / reading, "computing_share": share}
                yield row | {"predictor_images_per_s": given, "predictor_reading_images_per_s": reading}


def _write(folder: Path, size: int, images: int) -> None:
    folder.mkdir()
    for n in range(images):
        if n < FILES:
            (folder / f"{n:06d}.jpg").write_bytes(picture_file(n, "JPEG", size))
        else:
            os.link(folder / f"{n % FILES:06d}.jpg", folder / f"{n:06d}.jpg")


def _job(folder: Path, run: list[str], workers: int) -> tuple[float, float]:
    """Images a second from the first answers on, and the share of this time in which workers computed."""
    options = [word for pair in zip(("--storage", "--run", "--backbone"), run, strict=True) for word in pair]
    output = folder / "answers.jsonl"
    output.unlink(missing_ok=True)
    job = [str(ROOT / "jobs" / "predict.py"), str(folder / "images"), *options, "--output", str(output)]
    (said,) = _outputs([[*job, "--num-workers", str(workers)]])
    found = re.search(r"([\d,]+) images/s from the first answers on, workers computed (\d+)%", said)
    if found is None:
        raise AssertionError(f"too few images for a rate: {said}")
    return float(found[1].replace(",", "")), int(found[2]) / 100


def _alone(words: list[str], processes: int) -> float:
    return sum(map(float, _outputs([["-m", "benchmarks.prediction", *words]] * processes)))


def _outputs(commands: list[list[str]]) -> list[str]:
    """What Python prints for each of the commands, which run side by side."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    running = [
        subprocess.Popen([sys.executable, *c], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for c in commands
    ]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise AssertionError(f"a command of the benchmark failed: {commands[0]}")
    return outputs


def predictor_rate(storage: str, run: str, backbone: str, seconds: float, folder: str | None) -> float:
    """Images a second of a worker's predictor, on one thread, in passes as large as a worker's; with a folder it reads
    and decodes its files each time."""
    torch.set_num_threads(1)
    told = Namespace(backbone=backbone, pretrained=None, directory=None)
    config = told_config(storage, run, None, told)
    predictor = Learnt.of(storage, run, config, None, TEMPLATE).predictor()
    preprocess = predictor.predictor.backbone.preprocess
    files = sorted(Path(folder).iterdir())[:FILES] if folder else []
    few = [files[n : n + IMAGES_PER_PASS] for n in range(0, len(files), IMAGES_PER_PASS)]
    pictures = [picture_file(n, "JPEG", SIZES[0]) for n in range(FILES)]
    passes = torch.stack([preprocess(decode_image(data)) for data in pictures]).split(IMAGES_PER_PASS)
    answered, started = 0, 0.0
    for number in range(10**9):
        if number == len(passes):  # each was answered once: class features are computed when they are first needed
            answered, started = 0, time.perf_counter()
        pixels = passes[number % len(passes)]
        if folder:
            paths = few[number % len(few)]
            pixels = torch.stack([preprocess(decode_image(path.read_bytes())) for path in paths])
        answered += len(predictor.answer_pixels(pixels))
        if started and time.perf_counter() - started >= seconds:
            break
    return answered / (time.perf_counter() - started)


if __name__ == "__main__":
    storage, run, backbone, seconds, *folder = sys.argv[1:]
    print(predictor_rate(storage, run, backbone, float(seconds), folder[0] if folder else None))
