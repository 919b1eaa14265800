"""The command lines of the verbs: options, and ``KEY VALUE`` overrides of the config."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import ConfigError, error_line
from .files import check_folder

# A key of a config as a word of a command line, e.g. SOLVER.MAX_ITER.
_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+")
# Detectron2's keys that have no node.
_PLAIN_KEYS = ("OUTPUT_DIR", "SEED", "VERSION", "VIS_PERIOD", "CUDNN_BENCHMARK")


class CommandParser(argparse.ArgumentParser):
    """A parser that complains in one line, as all other mistakes of users end, and whose ``--help``
    shows the description as it stands."""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        sys.exit(error_line(f"{message}; see {self.prog} --help"))

    def parse_command(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse options, and the ``KEY VALUE`` pairs among them as the list ``opts``.

        Raises:
            SystemExit: an unknown option or a bad value of one.
            ConfigError: a key without a value.
        """
        options, opts = split_overrides(sys.argv[1:] if argv is None else argv)
        args = self.parse_args(options)
        args.opts = opts
        return args


def natural(text: str, least: int = 0) -> int:
    """The type of an option: a whole number of at least 0."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least {least}")
    return int(text)


def positive(text: str) -> int:
    """The type of an option: a whole number of at least 1."""
    return natural(text, 1)


def positive_number(text: str) -> float:
    """The type of an option: a number above 0, and finite."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' must be a positive number")
    return number


def file_to_write(*endings: str) -> Callable[[str], Path]:
    """The type of an option: a file that can be written, with one of these endings if there are
    some. Its folder need not be there."""

    def check(text: str) -> Path:
        if endings and not text.lower().endswith(endings):
            raise argparse.ArgumentTypeError(f"'{text}' must end in {' or '.join(endings)}")
        if Path(text).is_dir() or not Path(text).name:
            raise argparse.ArgumentTypeError(f"'{text}' is a folder: name a file")
        _check_folder(text, Path(text).parent)
        return Path(text)

    return check


def folder_to_write(text: str) -> Path:
    """The type of an option: a folder that can be written; it need not be there."""
    _check_folder(text, Path(text))
    return Path(text)


def _check_folder(text: str, folder: Path) -> None:
    try:
        check_folder(folder)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"'{text}': {error}; name another one") from error


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options among ``argv``, and its ``KEY VALUE`` pairs, wherever they stand; the word
    ``--opts`` may stand before them, as in version 0.1."""
    options, opts, words = [], [], iter(argv)
    for word in words:
        if word not in _PLAIN_KEYS and not _KEY.fullmatch(word):
            options += [word] if word != "--opts" else []
            continue
        value = next(words, None)
        if value is None or value.startswith("--"):
            raise ConfigError(f"overrides are KEY VALUE pairs: {word} has no value")
        opts += [word, value]
    return options, opts
