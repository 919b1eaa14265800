"""Taps: what the student computed, captured from its own unmodified forward.

Forward hooks on submodules, and recording wrappers on methods for the time of a forward; which ones
is for the parts to say, and checked when the model is built. They only keep references to tensors
that the student's own losses hold on to anyway, and drop them after the step.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import ConfigError
from .bundle import Batch, FeatureBundle
from .inputs import feeds_backbone, normalisation
from .part import Call, StudentStep, detector_parts
from .spec import DetectorSpec, feature_strides

_MISSING = object()


class Taps:
    """Taps on a student; ``with taps:`` records one forward, :meth:`bundle` reads it.

    Args:
        student: the detector to tap.
        spec: its :func:`~d2kd.detectors.spec.describe_detector`.

    Attributes:
        normalisation: how its backbone's input was made; None where that is not known.

    Raises:
        ConfigError: the student lacks a submodule or method that a part taps.
    """

    def __init__(self, student: nn.Module, spec: DetectorSpec):
        self.student = student
        self.spec = spec
        self.normalisation = normalisation(student) if feeds_backbone(student) else None
        self.parts = [part for part in detector_parts() if part.is_served(spec)]
        self._recording = False
        self._calls: dict[str, list[Call]] = defaultdict(list)
        self._methods: list[str] = []
        self._replaced: list[tuple[nn.Module, str, Any]] = []
        paths = [path for part in self.parts for path in part.taps(student, spec)]
        for path in dict.fromkeys(["backbone", *paths]):
            self._tap(path)

    def _tap(self, path: str) -> None:
        parent, _, name = path.rpartition(".")
        try:
            target = getattr(self.student.get_submodule(parent), name)
        except AttributeError:
            target = None
        if not callable(target):
            raise ConfigError(
                f"the student, a {type(self.student).__name__}, has no '{path}' to read from"
            )
        if isinstance(target, nn.Module):
            # Not a closure: a copy of the Distiller records into its own taps, and can be pickled.
            target.register_forward_hook(functools.partial(self._record_module, path))
        else:
            self._methods.append(path)

    def _record_module(
        self, path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any
    ) -> None:
        if self._recording:
            self._calls[path].append(Call(inputs, output))

    def _record_method(self, path: str, method: Callable[..., Any], *inputs: Any, **kw: Any) -> Any:
        output = method(*inputs, **kw)
        self._calls[path].append(Call((*inputs, *kw.values()), output))
        return output

    def __enter__(self) -> Taps:
        self._calls.clear()
        self._recording = True
        for path in self._methods:
            parent, _, name = path.rpartition(".")
            owner = self.student.get_submodule(parent)
            # In the instance, over the class's own, and only now: copies of it see nothing of this.
            self._replaced.append((owner, name, vars(owner).get(name, _MISSING)))
            recorded = functools.partial(self._record_method, path, getattr(owner, name))
            vars(owner)[name] = recorded
        return self

    def __exit__(self, *_: object) -> None:
        self._recording = False
        while self._replaced:
            owner, name, before = self._replaced.pop()
            if before is _MISSING:
                del vars(owner)[name]
            else:
                vars(owner)[name] = before

    def clear(self) -> None:
        """Drop the references to the last step's tensors."""
        self._calls.clear()

    def bundle(self, batch: Batch) -> FeatureBundle:
        """The student's view of the forward that was recorded last."""
        step = StudentStep(self.student, self.spec, batch, self._calls)
        (images, *_), features = step.calls("backbone")[0]
        bundle = FeatureBundle(
            self.spec,
            image_sizes=batch.image_sizes,
            images=images,
            padded_size=tuple(images.shape[-2:]),
            pyramid={s: features[name] for name, s in feature_strides(self.student).items()},
        )
        for part in self.parts:
            part.join(bundle, part.student_view(step))
        return bundle
