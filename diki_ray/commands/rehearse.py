"""`diki-ray rehearse`: a benchmark's own configuration on fabricated data, so that everything but the data is tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diki_ray.commands.output import console
from diki_ray.config import Config
from diki_ray.config.protocols import protocol
from diki_ray.data.sources.fabrication import fabricate
from diki_ray.errors import ConfigError
from diki_ray.report.next_steps import typed
from diki_ray.runs.continual import run_continual
from diki_ray.runs.plan import device_of
from diki_ray.runs.stopping import stoppable

MARK = "FABRICATED.txt"
"""Says of a folder that what is in it may be written again."""


@stoppable
def main(config: Config) -> int:
    """Fabricate the data sets, run the benchmark on them, and say what was tried; the exit code."""
    shown, sources = console(), Path(str(config.data.sources))
    name, _, split = config.protocol.partition("/")
    names = protocol(name).order
    said = f"fabricating {len(names)} data sets in {sources}; the run calls each of them incomplete, which it is …"
    shown.print(said, highlight=False, soft_wrap=True)
    fabricate_all(names, split, sources)
    results = run_continual(config, shown)
    shown.print(tried(config, results), highlight=False, markup=False, soft_wrap=True)
    return 0


def fabricate_all(names: tuple[str, ...], split: str, place: Path) -> None:
    """Writes these data sets into a folder of fabricated ones.

    Raises:
        ConfigError: the folder has something else in it.
    """
    if place.exists() and any(place.iterdir()) and not (place / MARK).is_file():
        raise ConfigError(f"{place.resolve()} is not a rehearsal's: move it away, or rehearse in another folder.")
    place.mkdir(parents=True, exist_ok=True)
    (place / MARK).write_text("Noise, written by `diki-ray rehearse`. Delete this folder when you have done with it.\n")
    for name in names:
        fabricate(name, split, place)


def tried(config: Config, results: dict[str, Any]) -> str:
    """What the rehearsal went through, for people."""
    train, num_tasks = config.train, len(results["tasks"])
    num_test = sum(task["num_test"] for task in results["tasks"])
    name = config.protocol.partition("/")[0]
    real = config.run.storage.rpartition("/")[0]
    return "\n".join(
        [
            f"Rehearsed: {num_tasks} data sets in the layout of {config.protocol}, prepared in {config.data.root};",
            f"  {len(results['trained'])} modules trained ({train.strategy} on {device_of(config)}, workers: "
            f"{train.most_workers}); {num_test:,} test images evaluated (workers: {config.evaluate.num_workers});",
            f"  modules, results and report in {config.run.storage}.",
            "The images are noise and the model is the tiny embedded one: the accuracies mean nothing.",
            "Not tried: your data, the weights of the real backbone, and the memory and time that it takes.",
            f"When you have seen enough, delete {config.run.storage} and {config.data.sources}.",
            "The benchmark itself:",
            f"  {typed()} continual --config {name.replace('-', '_')} protocol={config.protocol} --storage {real} "
            "data.sources=FOLDER",
        ]
    )
