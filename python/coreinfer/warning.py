"""Warnings that point at the line of the user's that led to them, however deep they come from."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """A UserWarning of the first caller that is no part of this package."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
