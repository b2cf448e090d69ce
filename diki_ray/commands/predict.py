"""`diki-ray predict`: images answered with what a run has learnt."""

import argparse
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from diki_ray.commands.output import console, print_json, print_text
from diki_ray.config import Config
from diki_ray.data.inputs import is_collection, parts_of
from diki_ray.errors import ConfigError
from diki_ray.prediction.run_predictor import Answer, load_predictor, read_image
from diki_ray.runs.stopping import stoppable
from diki_ray.runs.stored_run import told_config

DEFAULT_TEMPLATE = "a photo of a {}."


@stoppable
def main(arguments: argparse.Namespace) -> int:
    """Answer the images, shown or written; the exit code."""
    if arguments.output is not None:
        predict_all(arguments)
        return 0
    answers = predict(arguments)
    if arguments.json:
        named = zip(arguments.images, answers, strict=True)
        print_json([{"image": image} | asdict(a) for image, a in named])
    else:
        show(arguments.images, answers)
    return 0


def run_of(arguments: argparse.Namespace) -> tuple[str, str, Config | None]:
    """Storage and name of the run, and the configuration that is given."""
    return (
        arguments.storage,
        arguments.run,
        told_config(arguments.storage, arguments.run, arguments.config, arguments),
    )


def classes_of(arguments: argparse.Namespace) -> list[str] | None:
    return None if arguments.classes is None else [name.strip() for name in arguments.classes.split(",")]


def predict(arguments: argparse.Namespace) -> list[Answer]:
    if collections := [place for place in arguments.images if is_collection(place)]:
        raise ConfigError(f"{collections[0]} is more than an image: give --output, as in --output answers.jsonl.")
    predictor = load_predictor(*run_of(arguments))
    classes = classes_of(arguments)
    if classes is not None:
        predictor = predictor.among(classes, arguments.template or DEFAULT_TEMPLATE)
    return list(predictor.answer(read_image(path) for path in arguments.images))


def predict_all(arguments: argparse.Namespace) -> None:
    from diki_ray.prediction.batch import Workers, answer_all  # Ray, which a few images do not need
    from diki_ray.prediction.batch_output import check
    from diki_ray.prediction.batch_worker import Learnt

    check(arguments.output)
    parts = parts_of(arguments.images)
    learnt = Learnt.of(*run_of(arguments), classes_of(arguments), arguments.template or DEFAULT_TEMPLATE)
    workers = Workers(arguments.num_workers, arguments.cpus_per_worker, arguments.gpus_per_worker, arguments.address)
    answer_all(learnt, parts, arguments.output, workers, arguments.max_skipped, print_text)


def show(images: list[str], answers: list[Answer]) -> None:
    table = Table()
    for column in ("image", "class", "confidence", "task", "weight", "log densities"):
        table.add_column(column, justify="right" if column in ("confidence", "weight") else "left", overflow="fold")
    for image, a in zip(images, answers, strict=True):
        densities = "  ".join(f"{task} {value:,.0f}" for task, value in a.log_densities.items())
        task = a.task or "(frozen model)"
        cells = (image, a.class_name, f"{100 * a.confidence:.1f} %", task, f"{a.weight:.3f}", densities)
        table.add_row(*map(Text, cells))  # as it is: a class may be called [b]
    console().print(table)
