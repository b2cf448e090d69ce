"""`diki-ray predict` as a file, which is what a Ray job submission takes."""

import sys

from diki_ray.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())
