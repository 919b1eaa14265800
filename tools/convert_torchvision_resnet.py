#!/usr/bin/env python
"""ImageNet weights of a ResNet, from torchvision's format to Detectron2's.

    python tools/convert_torchvision_resnet.py resnet18.pth datasets/pretrained/R-18.pkl

The input is the state dict of torchvision's resnet18 to resnet152, of its ResNeXt or of its Wide
ResNet. What a config must say to use the result is printed.
"""

from __future__ import annotations

import argparse
import os
import sys

from d2kd.errors import ConfigError
from d2kd.files import write_atomically
from d2kd.models.torchvision_resnet import (
    config_lines,
    convert_torchvision_resnet,
    read_torchvision,
    write_detectron2,
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="a state dict, saved by torch.save")
    parser.add_argument("output", help="a .pkl file")
    args = parser.parse_args(argv)
    if not args.output.endswith(".pkl"):
        parser.error(f"Detectron2 reads this format from .pkl files only, not {args.output}")
    try:
        weights = read_torchvision(args.input)
        converted = convert_torchvision_resnet(weights)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    write_atomically(args.output, lambda temporary: write_detectron2(converted, temporary))
    print(f"wrote {args.output}, {len(converted)} tensors; the config needs\n")
    print(config_lines(weights, args.output))


if __name__ == "__main__":
    main()
