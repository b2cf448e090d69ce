"""Answer images with what a run has learnt: python jobs/predict.py IMAGE… --storage runs --run quickstart

Needs the run's storage and no cluster. By default among all classes learnt; with --classes among any you name:

    python jobs/predict.py photo.jpg --run quickstart --classes "red fox,badger" --template "a photo of a {}."
"""

import argparse
import json
import sys
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diki_ray import config
from diki_ray.errors import UserError
from diki_ray.runtime.inference import Answer, load_predictor, read_image


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, or s3://, gs://, az://, https://")
    parser.add_argument("--storage", help="of the run (default: the configuration's, or runs)")
    parser.add_argument("--run", help="its name (default: the configuration's)")
    parser.add_argument("--config", metavar="FILE", help="default: the one stored with the run's results")
    parser.add_argument("--classes", metavar="A,B,…", help="choose among these classes, learnt or not")
    parser.add_argument("--template", help="their caption, with {} for the name (default: 'a photo of a {}.')")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    arguments = parser.parse_args()
    if arguments.run is None and arguments.config is None:
        parser.error("give --run (with --storage), or --config")
    if arguments.template is not None and arguments.classes is None:
        parser.error("--template is for --classes")
    try:
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


def predict(arguments: argparse.Namespace) -> list[Answer]:
    configured = config.load(arguments.config) if arguments.config else None
    storage = arguments.storage or (configured.run.storage if configured else "runs")
    run = arguments.run or (configured.run.name if configured else "")
    predictor = load_predictor(storage, run, configured)
    if arguments.classes is not None:
        names = [name.strip() for name in arguments.classes.split(",")]
        predictor = predictor.among(names, arguments.template or "a photo of a {}.")
    return list(predictor.answer(read_image(path) for path in arguments.images))


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


if __name__ == "__main__":
    sys.exit(main())
