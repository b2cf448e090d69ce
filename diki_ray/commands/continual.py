"""`diki-ray continual`: learn a stream of tasks."""

from __future__ import annotations

from diki_ray.commands.output import console
from diki_ray.config import Config
from diki_ray.runs.continual import run_continual
from diki_ray.runs.stopping import stoppable


@stoppable
def main(config: Config, config_file: str) -> int:
    """Learn what is in the configuration and not yet in the store, and evaluate the stream; the exit code."""
    run_continual(config, console(), config_file)
    return 0
