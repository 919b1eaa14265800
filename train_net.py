#!/usr/bin/env python
"""Train, distil and evaluate detectors: a program to use, or to copy for a project of your own.

python train_net.py --config-file configs/digits/retinanet_R18_ssim.yaml
python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/.../student_final.pth
python train_net.py --config-file ... --resume SOLVER.MAX_ITER 9000
"""

from d2kd.engine.launch import launch
from d2kd.engine.setup import build_parser
from d2kd.engine.train import evaluate, prepare
from d2kd.engine.trainer import DistillTrainer


class Trainer(DistillTrainer):
    """Detectron2's DefaultTrainer, for a Distiller too; override build_train_loader,
    build_evaluator, build_hooks, ... as in Detectron2."""


def main(args):
    """One process of a job."""
    cfg, trainer_class = prepare(args, Trainer)  # read and checked; nothing is written yet
    if args.eval_only:
        return evaluate(cfg, resume=args.resume, trainer_class=trainer_class)
    return trainer_class(cfg, resume=args.resume).train()


if __name__ == "__main__":
    # One process for each GPU; a mistake in config or data ends it in one line.
    launch(main, build_parser(epilog=__doc__).parse_args())
