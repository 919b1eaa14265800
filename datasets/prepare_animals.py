"""Turns a clone of 977 photographs of animals (boxes and masks, 7 classes) into COCO format.

    git clone https://github.com/KomaHomu/Applying-Mask-RCNN-in-endangered-animals-detection
    python datasets/prepare_animals.py Applying-Mask-RCNN-in-endangered-animals-detection

Then animals_train, animals_part, animals_tune, animals_val and animals_test can be used in
DATASETS.TRAIN and DATASETS.TEST; datasets/README.md says what is in them.
"""

from __future__ import annotations

from functools import partial

from d2kd.cli import end_in_one_line
from d2kd.data.files import run_conversion
from d2kd.data.photographs import ANIMALS, convert

if __name__ == "__main__":
    end_in_one_line(lambda: run_conversion("animals", partial(convert, ANIMALS), __doc__))
