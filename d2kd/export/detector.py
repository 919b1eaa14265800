"""Running a file that ``d2kd export`` wrote, as Detectron2's DefaultPredictor runs a model."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..errors import ConfigError, first_line
from .graph import METADATA, Interface, check_onnx, quietly


class ExportedDetector:
    """A file of ``d2kd export``, used as Detectron2's ``DefaultPredictor`` is.

    Args:
        path: of TorchScript (.ts) or ONNX (.onnx).
        device: "cpu" or "cuda". TorchScript runs on the device that it was exported for, ONNX where
            onnxruntime can.

    Attributes:
        interface: what its input must be, and the names of its classes.

    Raises:
        ConfigError: there is no such file, it is not of ``d2kd export``, or cannot run there.
    """

    def __init__(self, path: str | os.PathLike, device: str = "cpu"):
        self.path, self.device = os.fspath(path), device
        if not os.path.isfile(self.path):
            raise ConfigError(f"no file '{self.path}'")
        load = _load_onnx if self.path.endswith(".onnx") else _load_torchscript
        self._run, interface = load(self.path, device)
        self.interface = Interface.read(interface, self.path)

    def run(self, canvas: Tensor) -> dict[str, Tensor]:
        """The outputs of the graph, by name, for the (3, H, W) float32 ``canvas``."""
        return dict(zip(self.interface.outputs, self._run(canvas), strict=True))

    def __call__(self, image: np.ndarray) -> dict[str, Instances]:
        """Detections in an image.

        Args:
            image: (h, w, 3) uint8, BGR, as OpenCV reads it.

        Returns:
            ``instances``: ``pred_boxes``, ``scores``, ``pred_classes`` and, where the model has
            masks, ``pred_masks`` (N, h, w) bool, on the image as it was given.
        """
        if self.interface.format == "RGB":
            image = np.ascontiguousarray(image[:, :, ::-1])
        canvas, fitted = self.interface.canvas(image)
        found = {name: value.cpu() for name, value in self.run(canvas.to(self.device)).items()}
        instances = Instances(fitted)
        instances.pred_boxes = Boxes(found["boxes"])
        instances.scores, instances.pred_classes = found["scores"], found["classes"]
        if "masks" in found:
            instances.pred_masks = found["masks"][:, None]
        return {"instances": detector_postprocess(instances, *image.shape[:2])}


Run = Callable[[Tensor], tuple[Tensor, ...]]


def _load_torchscript(path: str, device: str) -> tuple[Run, str | bytes]:
    import torchvision  # noqa: F401  (has the operators for RoIs)

    interface = {METADATA: ""}
    try:
        # No map_location: of a graph for a GPU it would move constants there that belong to
        # Detectron2's arithmetic of sizes, which is the CPU's.
        with quietly():
            graph = torch.jit.load(path, _extra_files=interface)
    except RuntimeError as error:
        raise ConfigError(f"'{path}' is no TorchScript for here: {first_line(error)}") from error
    home = next((p.device.type for p in graph.parameters()), "")
    if home not in ("", torch.device(device).type):
        raise ConfigError(f"'{path}' was exported for {home}, not for {device}")

    def run(canvas: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return graph(canvas)

    return run, interface[METADATA]


def _load_onnx(path: str, device: str) -> tuple[Run, str]:
    check_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    on_gpu = torch.device(device).type == "cuda"
    provider = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise ConfigError(f"this onnxruntime has no {provider}; onnxruntime-gpu has")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    except Exception as error:
        raise ConfigError(f"'{path}' is no ONNX graph: {first_line(error)}") from error
    if provider not in session.get_providers():  # without CUDA's libraries it takes the CPU
        raise ConfigError(f"onnxruntime cannot use the GPU here: its {provider} does not start")

    def run(canvas: Tensor) -> tuple[Tensor, ...]:
        found = session.run(None, {"image": canvas.cpu().numpy()})
        return tuple(torch.from_numpy(value) for value in found)

    return run, session.get_modelmeta().custom_metadata_map.get(METADATA, "")
