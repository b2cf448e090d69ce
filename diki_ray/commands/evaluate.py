"""Evaluate what a run has learnt, under any routing, label space and order, without training:

    python jobs/evaluate.py runs quickstart
    python jobs/evaluate.py runs quickstart --routing batch --label-space all
    python jobs/evaluate.py runs quickstart --order gems,digits        only these are learnt; the others are unlearnt
    python jobs/evaluate.py runs quickstart --compare other-run        differences with confidence intervals

In this process, without a cluster; what was computed before is taken from the storage's cache. Beside the accuracies:
each class, who answers whose images, calibration of confidences (ECE), and the AUROC of the integration weight for
learnt against unlearnt domains.
"""

import argparse
import json
import sys
from typing import Any

from rich.console import Console

from diki_ray import config
from diki_ray.answering.comparison import compare
from diki_ray.answering.figures import Along, report
from diki_ray.clip.trust import add_backbone_options
from diki_ray.config import Config
from diki_ray.errors import UserError
from diki_ray.report.evaluation_table import comparison, tables
from diki_ray.runs.evaluate.stored import Asked, evaluate_stored
from diki_ray.runs.stored_run import told_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", metavar="STORAGE", help="a local folder, s3://, gs:// or az://")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--config", metavar="FILE", help="default: the one stored with the run's results")
    add_backbone_options(parser)
    parser.add_argument("--routing", choices=("image", "batch"), help="default: the run's")
    parser.add_argument("--label-space", choices=("task", "seen", "all"), help="default: the run's")
    parser.add_argument("--order", metavar="A,B,…", help="the tasks that are learnt, in this order; default: the run's")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test", help="default: %(default)s")
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="of the same storage, in the same way")
    parser.add_argument("--classes", action="store_true", help="show the accuracy on each class")
    parser.add_argument("--no-cache", action="store_true", help="compute all of it, and keep nothing")
    parser.add_argument("--json", action="store_true", help='print {"runs": […], "comparisons": […]}')
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        runs, comparisons = evaluate(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps({"runs": runs, "comparisons": comparisons}, indent=2, ensure_ascii=False))
        return 0
    for document in runs:
        console.print(*tables(document, arguments.classes), sep="\n")
    for document in comparisons:
        console.print(*comparison(document), sep="\n")
    return 0


def evaluate(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The report of each run, and the comparison of the others with the first."""
    order = None if arguments.order is None else tuple(name.strip() for name in arguments.order.split(","))
    asked = Asked(arguments.routing, arguments.label_space, order, arguments.split, cache=not arguments.no_cache)
    given = config.load(arguments.config) if arguments.config else None

    def evaluated(run: str, given: Config | None) -> Along:
        told = told_config(arguments.storage, run, given, arguments)
        return evaluate_stored(arguments.storage, run, asked, told, say)

    first, *others = (evaluated(run, None if n else given) for n, run in enumerate((arguments.run, *arguments.compare)))
    return [report(e) for e in (first, *others)], [compare(first, other) for other in others]


def say(done: int, total: int) -> None:
    if total:
        print(f"{done} of {total} batches of test images …", file=sys.stderr, flush=True)  # stdout may be JSON
