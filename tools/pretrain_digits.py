"""Version 0.1's name of ``d2kd pretrain``."""

import sys

from d2kd.cli import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
