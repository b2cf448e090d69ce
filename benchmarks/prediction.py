"""Batch prediction from image files on disk, against the predictor alone, in as many processes, on decoded images.

python -m benchmarks.prediction STORAGE RUN BACKBONE SECONDS   prints the images a second of the predictor alone
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
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


def prediction(world: World, num_tasks: int, num_classes: int, images: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each size and number of workers. The predictor alone runs before and after the job; its mean counts.

    A worker on a GPU has one of its own, so there are no more workers than GPUs.
    """
    rows = []
    most = torch.cuda.device_count() if world.device == "cuda" else max(WORKERS)
    modules = [picture_module(world, task, num_classes) for task in range(num_tasks)]
    for size in SIZES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            settings = stored(world, folder, modules, "classes")
            _write(folder / "images", size, images)
            for workers in (n for n in WORKERS if n <= most):
                run = [settings.storage, RUN, str(settings.backbone)]
                before = _alone(run, workers, seconds)
                rate, share = _job(folder, run, workers)
                alone = (before + _alone(run, workers, seconds)) / 2
                row = {"jpeg_px": size, "workers": workers, "images_per_s": rate, "of_predictor": rate / alone}
                rows.append(row | {"predictor_images_per_s": alone, "computing_share": share})
    return rows


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
    output = folder / f"answers-{workers}.jsonl"
    job = [str(ROOT / "jobs" / "predict.py"), str(folder / "images"), *options, "--output", str(output)]
    (said,) = _outputs([[*job, "--num-workers", str(workers)]])
    found = re.search(r"([\d,]+) images/s from the first answers on, workers computed (\d+)%", said)
    if found is None:
        raise AssertionError(f"too few images for a rate: {said}")
    return float(found[1].replace(",", "")), int(found[2]) / 100


def _alone(run: list[str], processes: int, seconds: float) -> float:
    rates = _outputs([["-m", "benchmarks.prediction", *run, str(seconds)]] * processes)
    return sum(map(float, rates))


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


def predictor_rate(storage: str, run: str, backbone: str, seconds: float) -> float:
    """Images a second of a worker's predictor, on one thread, in passes as large as a worker's."""
    torch.set_num_threads(1)
    told = Namespace(backbone=backbone, pretrained=None, directory=None)
    config = told_config(storage, run, None, told)
    predictor = Learnt.of(storage, run, config, None, TEMPLATE).predictor()
    preprocess = predictor.predictor.backbone.preprocess
    files = [picture_file(n, "JPEG", SIZES[0]) for n in range(FILES)]
    passes = torch.stack([preprocess(decode_image(data)) for data in files]).split(IMAGES_PER_PASS)
    answered, started = 0, 0.0
    for number in range(10**9):
        if number == len(passes):  # each was answered once: class features are computed when they are first needed
            answered, started = 0, time.perf_counter()
        answered += len(predictor.answer_pixels(passes[number % len(passes)]))
        if started and time.perf_counter() - started >= seconds:
            break
    return answered / (time.perf_counter() - started)


if __name__ == "__main__":
    print(predictor_rate(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])))
