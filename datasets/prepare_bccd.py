"""Turns a clone of BCCD (364 photographs of blood cells, MIT licence) into COCO format.

    git clone https://github.com/Shenggan/BCCD_Dataset
    python datasets/prepare_bccd.py BCCD_Dataset

Then bccd_train, bccd_val and bccd_test can be used in DATASETS.TRAIN and DATASETS.TEST.
"""

from __future__ import annotations

from d2kd.cli import end_in_one_line
from d2kd.data.bccd import convert_bccd
from d2kd.data.files import run_conversion

if __name__ == "__main__":
    end_in_one_line(lambda: run_conversion("bccd", convert_bccd, __doc__))
