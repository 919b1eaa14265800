"""COCO's metrics on the same reading of a dataset that training has."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from detectron2.evaluation import COCOEvaluator, coco_evaluation
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .classes import Classes
from .coco_metrics import fast_metrics, has_fast_metrics
from .loading import reading_of
from .records import Reading, repair_for_evaluation


class CocoEvaluator(COCOEvaluator):
    """Detectron2's, on ground truth that pycocotools reads correctly.

    Differs for files that lack ``area`` or ``iscrowd``, have annotation ids that are not positive,
    boxes without area, or categories in another order than the training set. The results of others
    are Detectron2's, by the fastest of its compiled metrics, faster-coco-eval's and pycocotools'.

    Args:
        dataset_name: a registered dataset.
        output_dir: where predictions go.
        kpt_oks_sigmas: TEST.KEYPOINT_OKS_SIGMAS; () stands for COCO's own of 17 keypoints.
        options: further ones of Detectron2's.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        kpt_oks_sigmas: tuple[float, ...] = (),
        **options: Any,
    ):
        # A dataset that is no COCO file is converted to one, which an earlier run may have left
        # here: it may be of other data.
        options = {"allow_cached_coco": False, "use_fast_impl": True, **options}
        is_fast = options.pop("use_fast_impl")
        is_compiled = coco_evaluation.COCOeval_opt is not COCOeval
        super().__init__(
            dataset_name,
            output_dir=output_dir,
            kpt_oks_sigmas=list(kpt_oks_sigmas),
            use_fast_impl=is_fast and is_compiled,
            **options,
        )
        self._lends_metrics = is_fast and not is_compiled and has_fast_metrics()
        self._use_fast_impl |= self._lends_metrics
        self._repair(reading_of(dataset_name), len(kpt_oks_sigmas))

    def _repair(self, reading: Reading | None, keypoints: int) -> None:
        api: COCO = self._coco_api
        if reading is None:  # a loader of the user's own, or a dataset that was converted
            categories = api.dataset["categories"]
            names, ids = (tuple(entry[key] for entry in categories) for key in ("name", "id"))
            reading = Reading(Classes(names, ids), masks=False, keypoints=keypoints)
        repair_for_evaluation(api.dataset, reading)
        with contextlib.redirect_stdout(io.StringIO()):
            api.createIndex()

    def _eval_predictions(self, *args, **kwargs):
        with fast_metrics() if self._lends_metrics else contextlib.nullcontext():
            super()._eval_predictions(*args, **kwargs)

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        """pycocotools orders classes by category id, Detectron2 takes that for the detector's."""
        numbers = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if class_names is not None and numbers:
            class_names = [class_names[numbers[category]] for category in sorted(numbers)]
        return super()._derive_coco_results(coco_eval, iou_type, class_names)
