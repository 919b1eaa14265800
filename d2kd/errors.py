"""The one kind of error that a user's mistake ends in, and how its message becomes one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_LINE = 300


class ConfigError(ValueError):
    """A mistake in the configuration, said in one line that names what is valid."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a message of one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)


def error_line(message: str) -> str:
    """The line that a program ends in: "error: " and ``message``, at most ``MAX_LINE`` long."""
    start = "error: "
    return start + one_line(message, MAX_LINE - len(start))


def one_line(message: str, limit: int = MAX_LINE) -> str:
    """``message`` with line breaks and runs of spaces folded, cut to ``limit`` characters.

    Args:
        limit: at least 4; what does not fit is replaced by "...".
    """
    text = " ".join(message.split())
    return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."


def close_names(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """ "; close: A, B", up to three ``known`` names that are like ``name``; "" where none is."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"; close: {', '.join(close)}" if close else ""
