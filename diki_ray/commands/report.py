"""`diki-ray report`: one HTML page of one run, or of several side by side."""

from __future__ import annotations

import argparse

from diki_ray.report.run import load_results, render
from diki_ray.store.files import write_bytes


def main(arguments: argparse.Namespace) -> int:
    """Write the page and say how large it is; the exit code."""
    page = render([load_results(run, arguments.storage) for run in arguments.runs])
    write_bytes(arguments.output, page.encode())
    print(f"{arguments.output}: {len(page.encode()):,} bytes")
    return 0
