"""One line on stderr that says how far a long step is; nothing where stderr is no terminal."""

from __future__ import annotations

import shutil
import sys
import time

_DELAY = 0.5  # seconds; what is done sooner needs no bar
_INTERVAL = 0.1


class ProgressLine:
    """`update(done, total)` redraws the line, `clear()` takes it away; usable as a callback."""

    def __init__(self, label: str, unit: str, scale: float = 1.0) -> None:
        self._label, self._unit, self._scale = label, unit, scale
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._begun = self._drawn_at = time.monotonic()
        self._drawn = False

    def update(self, done: int, total: int) -> None:
        """Draw the line if it is time to."""
        now = time.monotonic()
        if not self._shown or now - self._begun < _DELAY or now - self._drawn_at < _INTERVAL:
            return
        self._drawn, self._drawn_at = True, now
        numbers = f" {done / self._scale:,.0f}/{total / self._scale:,.0f} {self._unit}"
        room = shutil.get_terminal_size().columns - len(self._label) - len(numbers) - 5
        width = max(0, min(40, room))
        filled = round(width * done / max(1, total))
        bar = "#" * filled + "." * (width - filled)
        print(f"\r\x1b[2K{self._label} [{bar}]{numbers}", end="", file=sys.stderr, flush=True)

    __call__ = update

    def clear(self) -> None:
        """Take the line away; the next step may draw it again."""
        if self._drawn:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
        self._drawn = False
        self._begun = time.monotonic()


def fetch_line() -> ProgressLine:
    """The line for storing a fetched model."""
    return ProgressLine("storing", "MB", 1e6)
