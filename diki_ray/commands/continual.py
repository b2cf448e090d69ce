"""Learn a stream of tasks: python jobs/continual.py --config configs/quickstart.yaml [section.field=value ...]

Running the same command again continues the run: what is committed is not trained again, and a task that was added to
the configuration is trained alone.
"""

import argparse
import sys

from rich.console import Console

from diki_ray import config
from diki_ray.errors import UserError
from diki_ray.runs.continual import run_continual


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="as in train.epochs=3")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        run_continual(config.load(arguments.config, arguments.overrides), console, arguments.config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
