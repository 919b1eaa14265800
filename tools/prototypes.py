"""Version 0.1's name of ``d2kd prototypes``."""

import sys

from d2kd.cli import main

if __name__ == "__main__":
    main(["prototypes", *sys.argv[1:]])
