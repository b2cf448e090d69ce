"""Sweep a configuration with Ray Tune: python jobs/sweep.py --config configs/sweep_quick.yaml [section.field=value ...]

Overrides apply to the configuration that is varied. Every module is trained once; settings that have a result are not
run again. What is chosen is chosen on validation, and its test numbers are reported once.
"""

import argparse
import sys

from rich.console import Console

from diki_ray.config.sweep import load_sweep
from diki_ray.errors import UserError
from diki_ray.report.sweep_table import sweep_tables
from diki_ray.runs.run_cluster import cluster
from diki_ray.runs.sweep.files import CHOSEN, REPORT
from diki_ray.runs.sweep.sweep import run_sweep


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="a sweep's YAML file, see configs/sweep_*.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="as in train.epochs=3")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        sweep, config = load_sweep(arguments.config, arguments.overrides)
        # A trial that ASHA stops is reclaimed through the dashboard's state API: without it later trials would hang.
        with cluster(config, dashboard=sweep.scheduler == "asha"):
            document = run_sweep(sweep, config)
        for table in sweep_tables(document):
            console.print(table)
        folder = document["folder"]
        print(f"report: {folder}/{REPORT}; run the chosen setting: jobs/continual.py --config {folder}/{CHOSEN}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
