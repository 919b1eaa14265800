"""The command ``d2kd VERB``: which verbs there are, and how each of them ends.

A verb is a function ``main(argv)`` in a module that is imported when the verb is called. Whatever a
user does wrong ends it in one line ``error: ...`` on standard error, here and nowhere else.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .errors import ConfigError, close_names, error_line, one_line

INTERRUPTED = 130  # the exit status of what Ctrl-C ended, by convention of shells


class Verb(NamedTuple):
    """Where a verb's ``main`` is, and what it does in a few words."""

    module: str
    summary: str


VERBS = {
    "train": Verb("d2kd.commands.train", "train, distil or evaluate a detector"),
    "distill": Verb("d2kd.commands.distill", "teacher, student, data: all in one command"),
    "compare": Verb("d2kd.compare.command", "train a baseline and distilled students, compare AP"),
    "choose": Verb("d2kd.compare.choose", "find the head and weight for a pair, in limited time"),
    "check": Verb("d2kd.commands.check", "check datasets: annotations, images, a sheet of samples"),
    "check-teacher": Verb(
        "d2kd.commands.check_teacher", "check a teacher: AP by class, wrong classes and boxes"
    ),
    "benchmark": Verb("d2kd.benchmark.command", "measure what distillation adds to a step"),
    "prototypes": Verb("d2kd.commands.prototypes", "make and show Global Knowledge's prototypes"),
    "show": Verb("d2kd.commands.show", "draw training images, and what heads distil of them"),
    "export": Verb("d2kd.export.command", "export a student to TorchScript and ONNX, time it"),
    "convert": Verb("d2kd.commands.convert", "turn torchvision's ResNet weights into Detectron2's"),
    "demo": Verb("d2kd.commands.demo", "train a student without and with distillation, in minutes"),
    "pretrain": Verb("d2kd.commands.pretrain", "pre-train the backbone of a digits config"),
    "install-detectron2": Verb("d2kd.commands.install_detectron2", "install Detectron2 0.6"),
}


def usage() -> str:
    """What ``d2kd --help`` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return (
        "usage: d2kd VERB [options] [KEY VALUE ...]\n\n"
        "Knowledge distillation for Detectron2.\n\nverbs:\n" + "\n".join(lines) + "\n\n"
        "d2kd VERB --help says more of each, with an example."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb that ``argv`` (default: the arguments of this process) names."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return
    name, *arguments = words
    if name not in VERBS:
        close = close_names(name, VERBS, 0.7)
        sys.exit(error_line(f"no verb '{name}'{close}; valid: {', '.join(VERBS)}"))
    outer = sys.argv
    sys.argv = [f"d2kd {name}", *arguments]  # for the parsers' "usage: d2kd train ..."
    try:
        end_in_one_line(lambda: importlib.import_module(VERBS[name].module).main(arguments))
    finally:
        sys.argv = outer


def end_in_one_line(run: Callable[[], int | None]) -> None:
    """Call ``run`` and end the process as all verbs end: of a mistake with one line, of Ctrl-C with
    status 130, else with the status that ``run`` returns."""
    try:
        status = run()
    except ConfigError as error:
        sys.exit(error_line(str(error)))
    except KeyboardInterrupt as error:
        print(one_line(str(error)) or "stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f": {error.filename}" if error.filename else ""
        sys.exit(error_line(f"{error.strerror}{place}"))
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        sys.exit("error: Detectron2 is not installed: run d2kd install-detectron2")
    if status:
        sys.exit(status)
