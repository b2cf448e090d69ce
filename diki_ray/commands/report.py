"""`diki-ray report`: one HTML page of one run, or of several side by side."""

from __future__ import annotations

import argparse

from jinja2 import TemplateError

from diki_ray.commands.output import print_text
from diki_ray.errors import UserError
from diki_ray.report.run import load_results, render
from diki_ray.store.files import write_bytes
from diki_ray.store.log import brief

_FAULTS = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)
"""What arranging results raises that are none of ours; the page is made of them alone."""


def main(arguments: argparse.Namespace) -> int:
    """Write the page and say how large it is; the exit code."""
    results = [load_results(run, arguments.storage) for run in arguments.runs]
    try:
        page = render(results)
    except (*_FAULTS, TemplateError) as error:
        raise UserError(
            f"the results of {', '.join(arguments.runs)} are not what this version writes ({type(error).__name__}: "
            f"{brief(error)}): evaluate the run again."
        ) from error
    write_bytes(arguments.output, page.encode())
    print_text(f"{arguments.output}: {len(page.encode()):,} bytes")
    return 0
