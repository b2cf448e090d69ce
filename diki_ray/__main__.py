"""`python -m diki_ray COMMAND` is `diki-ray COMMAND`."""

import sys

from diki_ray.commands.app import run

if __name__ == "__main__":
    sys.exit(run())
