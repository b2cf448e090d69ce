"""Answer images with what a run has learnt: python jobs/predict.py IMAGE… --storage runs --run quickstart

Needs the run's storage and no cluster. By default among all classes learnt; with --classes among any you name:

    python jobs/predict.py photo.jpg --run quickstart --classes "red fox,badger" --template "a photo of a {}."

With --output any number of images: files, folders, globs, prepared data sets and WebDataset tars, answered over Ray.
One row for each input, in their order; an image that cannot be used is a row with an `error`:

    python jobs/predict.py photos more/*.jpg s3://bucket/shards/0001.tar --run quickstart --output answers.jsonl
    python jobs/predict.py photos --run quickstart --output s3://bucket/answers.parquet --address ray://head:10001
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diki_ray import config
from diki_ray.clip.trust import add_backbone_options
from diki_ray.config import Config
from diki_ray.data.inputs import is_collection, parts_of
from diki_ray.errors import ConfigError, UserError
from diki_ray.prediction.run_predictor import Answer, load_predictor, read_image
from diki_ray.runs.stored_run import told_config

DEFAULT_TEMPLATE = "a photo of a {}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, or s3://, gs://, az://, https://")
    parser.add_argument("--storage", help="of the run (default: the configuration's, or runs)")
    parser.add_argument("--run", help="its name (default: the configuration's)")
    parser.add_argument("--config", metavar="FILE", help="default: the one stored with the run's results")
    add_backbone_options(parser)
    parser.add_argument("--classes", metavar="A,B,…", help="choose among these classes, learnt or not")
    parser.add_argument("--template", help="their caption, with {} for the name (default: 'a photo of a {}.')")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    batch = parser.add_argument_group("over Ray")
    batch.add_argument("--output", metavar="PLACE", help="FILE.jsonl or FOLDER.parquet, local or s3://, gs://, az://")
    batch.add_argument(
        "--max-skipped", type=int, metavar="N", help="stop once more images are unusable; default: never"
    )
    batch.add_argument("--address", help="of the cluster (default: RAY_ADDRESS, else one started here)")
    batch.add_argument("--num-workers", type=int, help="default: as many as the cluster has room for")
    batch.add_argument("--cpus-per-worker", type=float, default=1.0, help="default: %(default)s")
    batch.add_argument("--gpus-per-worker", type=float, default=0.0, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.run is None and arguments.config is None:
        parser.error("give --run (with --storage), or --config")
    if arguments.template is not None and arguments.classes is None:
        parser.error("--template is for --classes")
    if arguments.output is not None and arguments.json:
        parser.error("--json is for answers that are shown; --output writes them")
    try:
        if arguments.output is not None:
            predict_all(arguments)
            return 0
        answers = predict(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        named = zip(arguments.images, answers, strict=True)
        print(json.dumps([{"image": image} | asdict(a) for image, a in named], indent=2, ensure_ascii=False))
    else:
        show(arguments.images, answers)
    return 0


def run_of(arguments: argparse.Namespace) -> tuple[str, str, Config | None]:
    """Storage and name of the run, and the configuration that is given."""
    configured = config.load(arguments.config) if arguments.config else None
    storage = arguments.storage or (configured.run.storage if configured else "runs")
    run = arguments.run or (configured.run.name if configured else "")
    return storage, run, told_config(storage, run, configured, arguments)


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
    answer_all(learnt, parts, arguments.output, workers, arguments.max_skipped, partial(print, flush=True))


def show(images: list[str], answers: list[Answer]) -> None:
    table = Table()
    for column in ("image", "class", "confidence", "task", "weight", "log densities"):
        table.add_column(column, justify="right" if column in ("confidence", "weight") else "left", overflow="fold")
    for image, a in zip(images, answers, strict=True):
        densities = "  ".join(f"{task} {value:,.0f}" for task, value in a.log_densities.items())
        task = a.task or "(frozen model)"
        cells = (image, a.class_name, f"{100 * a.confidence:.1f} %", task, f"{a.weight:.3f}", densities)
        table.add_row(*map(Text, cells))  # as it is: a class may be called [b]
    Console(width=None if sys.stdout.isatty() else 160).print(table)
