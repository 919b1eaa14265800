#!/usr/bin/env python3
"""``d2kd install-detectron2`` where d2kd is not installed yet."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    tool = Path(__file__).resolve().parents[1] / "d2kd/commands/install_detectron2.py"
    runpy.run_path(str(tool), run_name="__main__")
