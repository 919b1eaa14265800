#!/usr/bin/env python
"""Train, distil and evaluate detectors: ``d2kd train`` under the name that Detectron2's users know.

python train_net.py --config-file configs/digits/retinanet_R18_ssim.yaml
python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/.../student_final.pth
python train_net.py --config-file ... --resume SOLVER.MAX_ITER 9000
"""

import sys

from d2kd.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
