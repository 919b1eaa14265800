"""Turns a clone of BCCD (364 photographs of blood cells, MIT licence) into COCO format.

    git clone https://github.com/Shenggan/BCCD_Dataset
    python datasets/prepare_bccd.py BCCD_Dataset

Then bccd_train, bccd_val and bccd_test can be used in DATASETS.TRAIN and DATASETS.TEST.
"""

from __future__ import annotations

from pathlib import Path

from d2kd.arguments import CommandParser, folder_to_write
from d2kd.cli import end_in_one_line
from d2kd.data.bccd import convert_bccd
from d2kd.data.files import dataset_root


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("clone", type=Path, help="folder of the clone")
    parser.add_argument(
        "--output",
        type=folder_to_write,
        default=dataset_root() / "bccd",
        help="directory to make (default: %(default)s, where bccd_* are looked for)",
    )
    args = parser.parse_args()
    counts, changes = convert_bccd(args.clone, args.output)
    for line in changes:
        print(line)
    for split, count in counts.items():
        print(f"{split}: " + ", ".join(f"{number} {name}" for name, number in count.items()))
    print(f"Wrote {args.output}; {len(changes)} boxes dropped or clipped.")


if __name__ == "__main__":
    end_in_one_line(main)
