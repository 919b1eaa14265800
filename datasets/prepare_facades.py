"""Turns a clone of 598 photographs of facades (boxes and masks, 10 classes) into COCO format.

    git clone https://github.com/a-hwang/building-facade-segmentation
    python datasets/prepare_facades.py building-facade-segmentation

Then facades_train, facades_part, facades_tune, facades_val and facades_test can be used in
DATASETS.TRAIN and DATASETS.TEST; datasets/README.md says what is in them.
"""

from __future__ import annotations

from functools import partial

from d2kd.cli import end_in_one_line
from d2kd.data.files import run_conversion
from d2kd.data.photographs import FACADES, convert

if __name__ == "__main__":
    end_in_one_line(lambda: run_conversion("facades", partial(convert, FACADES), __doc__))
