"""Export a run as a bundle to hand on: python jobs/export.py STORAGE RUN FOLDER

FOLDER gets bundle.safetensors, a model card (README.md) and config.yaml. Load it anywhere, without Ray:

    import diki_ray
    diki_ray.load("FOLDER").predict(["photo.jpg"])
"""

import argparse
import sys

from diki_ray import config
from diki_ray.clip.trust import add_backbone_options
from diki_ray.errors import UserError
from diki_ray.prediction.bundle import export_bundle
from diki_ray.runs.stored_run import told_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", metavar="STORAGE", help="a local folder, s3://, gs:// or az://")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("folder", metavar="FOLDER", help="where it goes; local, s3://, gs:// or az://")
    parser.add_argument("--config", metavar="FILE", help="default: the one stored with the run's results")
    add_backbone_options(parser)
    arguments = parser.parse_args()
    try:
        given = config.load(arguments.config) if arguments.config else None
        given = told_config(arguments.storage, arguments.run, given, arguments)
        num_bytes = export_bundle(arguments.storage, arguments.run, arguments.folder, given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{num_bytes:,} bytes in {arguments.folder}/bundle.safetensors; its README.md says how to load it.")
    return 0
