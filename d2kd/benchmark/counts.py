"""What a step costs a GPU, whatever its speed: operators, kernels, and waits for the device.

Operators that would launch a kernel, and those that would make the host wait, are counted on any
device. What a GPU really launched, how long it was busy, and where the host really waited, only
on one.
"""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that start no kernel.
VIEWS = {
    *("_has_compatible_shallow_copy_type", "_reshape_alias", "_unsafe_view", "alias"),
    *("as_strided", "chunk", "detach", "diagonal", "empty", "empty_like", "empty_strided"),
    *("expand", "expand_as", "flatten", "is_pinned", "is_same_size", "lift_fresh", "movedim"),
    *("narrow", "new_empty", "new_empty_strided", "numpy_T", "permute", "prim", "reshape"),
    *("resolve_conj", "resolve_neg", "select", "slice", "split", "split_with_sizes", "squeeze"),
    *("sym_numel", "sym_size", "sym_storage_offset", "sym_stride", "t", "transpose"),
    *("unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as"),
}
# Operators whose result the host must see, or whose size depends on values.
WAITING = {
    *("_local_scalar_dense", "_unique2", "equal", "masked_select", "nonzero"),
    *("repeat_interleave", "unique_consecutive", "unique_dim"),
}
# Operators whose second argument is indices; masks among them must become numbers.
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Methods of tensors that are no operators on a CPU, and wait on a GPU.
READING = ("tolist", "numpy", "cpu")

_BACKWARD = "_engine_run_backward"  # PyTorch's function that calls the C++ engine
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@dataclass
class Counts:
    """Of one step.

    Attributes:
        operators: that would launch a kernel.
        waits: places of d2kd's own at which the host waits, or would.
        student_waits: number of those in the student's own forward and backward pass.
    """

    operators: int = 0
    waits: list[str] = field(default_factory=list)
    student_waits: int = 0


class _Count(TorchDispatchMode):
    def __init__(self, counts: Counts, wait: Callable[[str], None]):
        super().__init__()
        self.counts, self.wait = counts, wait

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        self.counts.operators += name not in VIEWS
        if name in WAITING or (name in INDEXING and _by_mask(args[1])):
            self.wait(name)
        return function(*args, **(kwargs or {}))


def _by_mask(indices: list[Tensor | None]) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def count_operators(
    step: Callable[[], object], student: nn.Module, may_wait: tuple[str, ...] = ()
) -> Counts:
    """Operators of a call of ``step``, its backward pass too, and those that would wait.

    Args:
        student: whose passes within ``step`` wait on their own account.
        may_wait: words of names of functions, e.g. "nms", whose waits are not counted.
    """
    counts = Counts()
    with contextlib.ExitStack() as stack:
        wait = stack.enter_context(_waits(counts, student, may_wait))
        for name in READING:
            stack.enter_context(mock.patch.object(Tensor, name, _waiting(name, wait)))
        stack.enter_context(_Count(counts, wait))
        step()
    return counts


def count_waits(
    step: Callable[[], object], student: nn.Module, may_wait: tuple[str, ...] = ()
) -> Counts:
    """On a GPU: waits of a call of ``step`` as CUDA reports them. Arguments as above."""
    counts = Counts()
    torch.cuda.synchronize()
    with _waits(counts, student, may_wait) as wait, warnings.catch_warnings():

        def take_down(message: Any, *_: Any, **__: Any) -> None:
            # Not the one that says, once, that this mode is a prototype.
            if "called a synchronizing" in str(message):
                wait("wait")

        warnings.simplefilter("always")
        warnings.showwarning = take_down
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return counts


@contextlib.contextmanager
def _waits(
    counts: Counts, student: nn.Module, may_wait: tuple[str, ...]
) -> Iterator[Callable[[str], None]]:
    """A function that takes down a wait by its name, unless a function that may is under way.

    After each forward pass of the student, its own backward pass is made once more than the step
    needs: a GPU reports the waits of a backward pass without their places, so those of the student
    can only be taken off by their number.
    """
    depth = own_backward = 0

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal depth, own_backward
        operators, waits = counts.operators, counts.student_waits
        _backward(student, output)
        counts.operators = operators
        own_backward += counts.student_waits - waits
        depth -= 1

    def wait(name: str) -> None:
        nonlocal own_backward
        if depth:
            counts.student_waits += 1
            return
        stack = [f for f in traceback.extract_stack() if f.filename != __file__]
        names = [frame.name for frame in stack]
        if any(f"_{words}_" in f"_{called}_" for called in names for words in may_wait):
            return
        # A place in a backward pass is a function that the engine calls, not what calls the engine.
        engine = len(names) - names[::-1].index(_BACKWARD) if _BACKWARD in names else 0
        own = [frame for frame in stack[engine:] if frame.filename.startswith(_PACKAGE)]
        if own:
            place = own[-1].filename.removeprefix(_PACKAGE)
            counts.waits.append(f"{name} at {place}:{own[-1].lineno}")
        elif engine and own_backward:
            own_backward -= 1
        else:
            counts.waits.append(f"{name} in the backward pass" if engine else name)

    hooks = [student.register_forward_pre_hook(enter), student.register_forward_hook(leave)]
    try:
        yield wait
    finally:
        for hook in hooks:
            hook.remove()


def _backward(model: nn.Module, losses: Any) -> None:
    """The backward pass of what ``model`` returned; graph and gradients stay as they are."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = (leaf for leaf in tree_leaves(losses) if isinstance(leaf, Tensor))
    terms = [loss.sum() for loss in found if loss.requires_grad]
    if parameters and terms:
        torch.autograd.grad(sum(terms), parameters, retain_graph=True, allow_unused=True)


def _waiting(name: str, wait: Callable[[str], None]) -> Callable[..., Any]:
    """A tensor's method that says that it waits."""
    original = getattr(Tensor, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        wait(name)
        return original(*args, **kwargs)

    return watched


def profile_kernels(step: Callable[[], object], trace: str = "") -> tuple[int, float]:
    """On a GPU: the number of kernels that a call of ``step`` launches, copies left out, and the
    seconds that they take.

    Args:
        trace: file for the profiler's trace, for chrome://tracing or Perfetto; "" for none.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    if trace:
        profile.export_chrome_trace(trace)
    kernels = [
        event
        for event in profile.events()
        if event.device_type == DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        # The spans of an optimiser's step and the like, which hold kernels of their own.
        and not getattr(event, "is_user_annotation", False)
    ]
    return len(kernels), sum(e.self_device_time_total for e in kernels) / 1e6
