"""ImageNet weights of a ResNet, from torchvision's format to Detectron2's.

    d2kd convert resnet18.pth datasets/pretrained/R-18.pkl

The input is the state dict of torchvision's resnet18 to resnet152, of its ResNeXt or of its Wide
ResNet. What a config must say to use the result is printed.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..arguments import CommandParser, file_to_write
from ..checkpoint_files import read_state_dict
from ..files import write_atomically
from ..models.torchvision_resnet import (
    config_lines,
    convert_torchvision_resnet,
    write_detectron2,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert the file that the arguments name."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("input", help="a state dict, saved by torch.save")
    parser.add_argument(
        "output", type=file_to_write(".pkl"), help="a .pkl file, as Detectron2 knows the format"
    )
    args = parser.parse_args(argv)
    weights = read_state_dict(args.input)
    converted = convert_torchvision_resnet(weights)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, lambda temporary: write_detectron2(converted, temporary))
    print(f"wrote {args.output}, {len(converted)} tensors; the config needs\n")
    print(config_lines(weights, str(args.output)))
