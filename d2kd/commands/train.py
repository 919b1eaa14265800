"""Train, distil and evaluate detectors.

    d2kd train --config-file digits/retinanet_R18_ssim.yaml
    d2kd train --config-file ... --eval-only MODEL.WEIGHTS output/.../student_final.pth
    d2kd train --config-file ... --resume SOLVER.MAX_ITER 9000

A config is a file, a config that d2kd ships, or a name in Detectron2's model zoo.
"""

from __future__ import annotations

from ..engine import train


def main(argv: list[str] | None = None) -> None:
    """Train or evaluate as the arguments say."""
    train.main(argv, description=__doc__)
