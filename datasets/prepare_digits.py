"""Makes the digits dataset by hand: another size, other counts, another seed, a contact sheet.

Not needed for the defaults, which d2kd makes on first use.

    python datasets/prepare_digits.py --size 224 --train 5000 --contact-sheet digits.png
"""

from __future__ import annotations

import argparse
import dataclasses
import logging

from d2kd.arguments import CommandParser, file_to_write, folder_to_write
from d2kd.cli import end_in_one_line
from d2kd.data.digits import SPECS, DigitsSpec, contact_sheet, make_digits
from d2kd.data.files import dataset_root


def parse_args() -> argparse.Namespace:
    default = SPECS["digits"]
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--output",
        type=folder_to_write,
        default=dataset_root() / "digits",
        help="directory to make; a digits dataset of another make there is replaced "
        "(default: %(default)s, where digits_train and digits_val are looked for)",
    )
    for field, text in (
        ("size", "side of the square images, px"),
        ("train", "training images"),
        ("val", "validation images"),
        ("seed", "the same seed gives the same bytes"),
    ):
        parser.add_argument(
            f"--{field}",
            type=int,
            default=getattr(default, field),
            help=f"{text} (default: %(default)s)",
        )
    parser.add_argument(
        "--plain", action="store_true", help="large digits of strong contrast, no clutter"
    )
    parser.add_argument(
        "--contact-sheet",
        type=file_to_write(".jpg", ".png"),
        metavar="PICTURE",
        help="also save a picture of some images",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fields = [field.name for field in dataclasses.fields(DigitsSpec)]
    spec = DigitsSpec(**{name: getattr(args, name) for name in fields})
    if not make_digits(args.output, spec):
        print(f"{args.output} is up to date.")
    if args.contact_sheet:
        args.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(args.output).save(args.contact_sheet, quality=85)
        print(f"Contact sheet: {args.contact_sheet}")


if __name__ == "__main__":
    end_in_one_line(main)
