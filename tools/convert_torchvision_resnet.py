"""Version 0.1's name of ``d2kd convert``."""

import sys

from d2kd.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
