"""Version 0.1's name of ``d2kd show``."""

import sys

from d2kd.cli import main

if __name__ == "__main__":
    main(["show", *sys.argv[1:]])
