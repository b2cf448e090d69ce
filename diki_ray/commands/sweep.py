"""`diki-ray sweep`: run a sweep and show what it found."""

from __future__ import annotations

import shlex

from diki_ray.commands.output import console, print_text
from diki_ray.config import Config
from diki_ray.config.sweep import SweepConfig
from diki_ray.report.next_steps import typed
from diki_ray.report.sweep_table import sweep_tables
from diki_ray.runs.cluster import keeps_memory
from diki_ray.runs.run_cluster import cluster
from diki_ray.runs.stopping import stoppable
from diki_ray.runs.sweep.files import CHOSEN, REPORT
from diki_ray.runs.sweep.sweep import run_sweep


@stoppable
def main(sweep: SweepConfig, config: Config) -> int:
    """Run what has no result yet, choose on validation and show it; the exit code."""
    # A trial that ASHA stops is reclaimed through the dashboard's state API: without it later trials would hang.
    # Trials train and evaluate in their own processes, for which Tune has no environment but the job's.
    with cluster(config, dashboard=sweep.scheduler == "asha", runtime_env=keeps_memory()):
        document = run_sweep(sweep, config, print_text)
    for table in sweep_tables(document):
        console().print(table)
    folder = document["folder"]
    chosen = f"{typed()} continual --config {shlex.quote(f'{folder}/{CHOSEN}')}"
    print_text(f"report: {folder}/{REPORT}; run the chosen setting: {chosen}")
    return 0
