"""A detector as a graph of one image of a fixed size, in TorchScript or ONNX.

N detections; (H, W) the canvas, the fixed size of the input; M the side of a mask.

The graph takes ``image``, (3, H, W) float32 from 0 to 255 in the model's channel order, and gives

* ``boxes`` (N, 4) float32: x1, y1, x2, y2 in pixels of the canvas;
* ``classes`` (N,) int64;
* ``masks`` (N, M, M) float32: probabilities in each box, where the model has masks;
* ``scores`` (N,) float32.

What it is, :class:`Interface`, is part of the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.export import TracingAdapter
from detectron2.structures import Instances
from PIL import Image
from torch import Tensor, nn

from ..errors import ConfigError
from ..files import write_atomically

METADATA = "d2kd.json"  # the name of the interface in a file
# Predictions of a detector that a file holds.
KEPT = {"pred_boxes", "pred_classes", "pred_masks"}
# The first opset whose RoIAlign has Detectron2's alignment.
OPSET = 16


@dataclass(frozen=True)
class Interface:
    """What the input of an exported file must be, and what its output means.

    Args:
        format: channel order, "BGR" or "RGB".
        size: (H, W) of the canvas.
        padding: value of each channel where the image does not fill the canvas.
        classes: names by number.
        outputs: names, in order.
    """

    format: str
    size: tuple[int, int]
    padding: tuple[float, ...]
    classes: tuple[str, ...]
    outputs: tuple[str, ...]

    def json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, text: str | bytes, path: str) -> Interface:
        """The interface that the file ``path`` holds.

        Raises:
            ConfigError: ``text`` is not what :meth:`json` gave.
        """
        try:
            values = json.loads(text).items()
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values})
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"'{path}' was not written by d2kd export") from error

    def canvas(self, image: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
        """An image on the canvas, as large as fits, in its top left corner.

        Args:
            image: (h, w, 3) uint8 in the order of ``format``.

        Returns:
            (3, H, W) float32, and (height, width) of the image on it.
        """
        (height, width), (h, w) = self.size, image.shape[:2]
        scale = min(height / h, width / w)
        fitted = min(round(h * scale), height), min(round(w * scale), width)
        resized = Image.fromarray(image).resize(fitted[::-1], Image.Resampling.BILINEAR)
        canvas = torch.tensor(self.padding).view(-1, 1, 1).repeat(1, height, width)
        content = torch.from_numpy(np.asarray(resized).transpose(2, 0, 1).astype(np.float32))
        canvas[:, : fitted[0], : fitted[1]] = content
        return canvas, fitted


def detect(model: nn.Module, inputs: list[dict]) -> dict[str, Tensor]:
    """The outputs of the graph, by eager ``model``, for the one image of ``inputs``."""
    found = _instances(model, inputs)
    outputs = {"classes": found.pred_classes, "scores": found.scores}
    outputs["boxes"] = found.pred_boxes.tensor
    if found.has("pred_masks"):
        outputs["masks"] = found.pred_masks[:, 0]
    return outputs


def _instances(model: nn.Module, inputs: list[dict]) -> Instances:
    """What ``model`` finds in the image of ``inputs``, in pixels of the canvas."""
    if hasattr(model, "roi_heads"):
        return model.inference(inputs, do_postprocess=False)[0]
    return model(inputs)[0]["instances"]


def traceable(model: nn.Module, canvas: Tensor) -> TracingAdapter:
    """``model`` as a module from a tensor to a tuple of tensors, in the order of their names.

    Raises:
        ConfigError: the model cannot be given a single image, or finds what a file cannot hold.
    """
    # Its own mode counts, too: torch.onnx.export sets all modules to it afterwards.
    adapter = TracingAdapter(model, [{"image": canvas}], detect).eval()
    name = type(model).__name__
    try:
        adapter(canvas)
        fields = _instances(model, [{"image": canvas}]).get_fields()
    except Exception as error:
        raise ConfigError(
            f"a {name} cannot be exported: {type(error).__name__}: {error}"
        ) from error
    if lost := ", ".join(sorted(f for f in fields if f.startswith("pred_") and f not in KEPT)):
        raise ConfigError(
            f"a {name} cannot be exported: {lost} would be lost; a file holds boxes, classes, "
            "scores and masks"
        )
    return adapter


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without gradients, and without warnings: of what a trace fixes, which is the size, and
    otherwise shows when the file is compared with the model; that PyTorch has other plans."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def write_torchscript(
    adapter: TracingAdapter, canvas: Tensor, interface: Interface, path: str
) -> None:
    """Write the graph as TorchScript, for the device of ``canvas``, where the model is, too."""
    with quietly():
        traced = torch.jit.trace(adapter, (canvas,), check_trace=False)
        extra = {METADATA: interface.json()}
        write_atomically(path, lambda name: traced.save(name, _extra_files=extra))


def write_onnx(adapter: TracingAdapter, canvas: Tensor, interface: Interface, path: str) -> None:
    """Write the graph as ONNX; model and canvas are on the CPU."""
    import onnx

    buffer = io.BytesIO()
    with quietly():
        torch.onnx.export(
            adapter,
            (canvas,),
            buffer,
            input_names=["image"],
            output_names=list(interface.outputs),
            # What has no axis here has a fixed size.
            dynamic_axes={name: {0: "detections"} for name in interface.outputs},
            opset_version=OPSET,
            dynamo=False,  # torch.export cannot follow what depends on the number of proposals
        )
    graph = onnx.load_model_from_string(buffer.getvalue())
    graph.metadata_props.add(key=METADATA, value=interface.json())
    write_atomically(path, lambda name: onnx.save_model(graph, name))


def check_onnx() -> None:
    """Check that ONNX files can be written and run.

    Raises:
        ConfigError: a package is missing; says how to get it.
    """
    for name in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"{name} is not installed: pip install 'd2kd[export]', or use --formats torchscript"
            )
