#!/usr/bin/env python
"""Train, distil and evaluate detectors.

python train_net.py --config-file configs/digits/faster_rcnn_R18_ssim.yaml
python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/.../student_final.pth
python train_net.py --config-file ... --resume SOLVER.MAX_ITER 9000
"""

from d2kd.engine.train import main

if __name__ == "__main__":
    main(description=__doc__)
