"""``python -m d2kd``: the command ``d2kd``."""

from .cli import main

if __name__ == "__main__":  # a process of a training imports this file, too
    main()
