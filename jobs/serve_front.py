"""`diki-ray serve-front` as a file, which is what a Ray job submission takes."""

import sys
from functools import partial

from diki_ray.commands.app import run

main = partial(run, "serve-front")

if __name__ == "__main__":
    sys.exit(main())
