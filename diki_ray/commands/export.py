"""`diki-ray export`: a run as a bundle to hand on."""

import argparse

from diki_ray.commands.output import print_text
from diki_ray.prediction.bundle import export_bundle
from diki_ray.runs.stored_run import told_config


def main(arguments: argparse.Namespace) -> int:
    """Write the bundle and say where it is; the exit code."""
    given = told_config(arguments.storage, arguments.run, arguments.config, arguments)
    num_bytes = export_bundle(arguments.storage, arguments.run, arguments.folder, given)
    print_text(f"{num_bytes:,} bytes in {arguments.folder}/bundle.safetensors; its README.md says how to load it.")
    return 0
