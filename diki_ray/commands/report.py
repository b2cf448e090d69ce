"""Make one HTML page of one run, or of several side by side: python jobs/report.py RUN… [--storage runs]

RUN is the name of a run in the storage, or the path of a results.json. The page stands alone: no network, no scripts.
"""

import argparse
import sys

from diki_ray.errors import UserError
from diki_ray.report.run import load_results, render
from diki_ray.store.files import write_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's name, or the path of a results.json")
    parser.add_argument(
        "--storage", default="runs", help="a local folder, s3://, gs:// or az:// (default: %(default)s)"
    )
    parser.add_argument("--output", default="report.html", metavar="FILE", help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        page = render([load_results(run, arguments.storage) for run in arguments.runs])
        write_bytes(arguments.output, page.encode())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {len(page.encode()):,} bytes")
    return 0
