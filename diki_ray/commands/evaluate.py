"""`diki-ray evaluate`: what a run has learnt, evaluated in any way, in this process."""

import argparse
import sys
from typing import Any

from diki_ray.answering.comparison import compare
from diki_ray.answering.figures import Along, report
from diki_ray.commands.output import console, print_json
from diki_ray.config import Config
from diki_ray.report.evaluation_in_terminal import comparison, tables
from diki_ray.runs.evaluate.stored import Asked, evaluate_stored
from diki_ray.runs.stopping import stoppable
from diki_ray.runs.stored_run import told_config


@stoppable
def main(arguments: argparse.Namespace) -> int:
    """Evaluate, then print tables or JSON; the exit code."""
    runs, comparisons = evaluate(arguments)
    if arguments.json:
        print_json({"runs": runs, "comparisons": comparisons})
        return 0
    for document in runs:
        console().print(*tables(document, arguments.classes), sep="\n")
    for document in comparisons:
        console().print(*comparison(document), sep="\n")
    return 0


def evaluate(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The report of each run, and the comparison of the others with the first."""
    order = None if arguments.order is None else tuple(name.strip() for name in arguments.order.split(","))
    asked = Asked(arguments.routing, arguments.label_space, order, arguments.split, cache=not arguments.no_cache)

    def evaluated(run: str, given: Config | None) -> Along:
        told = told_config(arguments.storage, run, given, arguments)
        return evaluate_stored(arguments.storage, run, asked, told, say, named_data=given is not None)

    first, *others = (
        evaluated(run, None if n else arguments.config) for n, run in enumerate((arguments.run, *arguments.compare))
    )
    return [report(e) for e in (first, *others)], [compare(first, other) for other in others]


def say(what: str, done: int, total: int) -> None:
    if total:
        print(f"{done} of {total} {what} …", file=sys.stderr)  # stdout may be JSON
