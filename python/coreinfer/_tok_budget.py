"""What a chat template may still do: characters to make or move, and time.

`Budget.charge` is called before work is done, `Budget.measure` before a value is copied or written
out. Both raise `TemplateLimitError`. Templates, filters and operators are elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

ELEMENT_COST = 4  # an element of a list costs as much as four characters
CLOCK_INTERVAL = 16  # charges between two looks at the clock
CONTAINERS = (list, tuple, dict, set, frozenset)
_VIEWS = (type({}.items()), type({}.keys()), type({}.values()))


class TemplateLimitError(Exception):
    """The template asked for more work, memory or time than it may have."""


class Budget:
    """Work that a run may still do, in characters made or moved, and when it must be over."""

    def __init__(self, work: int, seconds: float) -> None:
        self.left = work
        self.deadline = time.monotonic() + seconds
        self._until_clock = CLOCK_INTERVAL

    def charge(self, cost: int) -> None:
        """Take `cost` characters off; raises where nothing is left or time is over."""
        self.left -= 1 + cost
        if self.left < 0:
            raise TemplateLimitError("it makes too much text or runs too many steps")
        self._until_clock -= 1
        if self._until_clock <= 0 or cost > 100_000:
            self._until_clock = CLOCK_INTERVAL
            if time.monotonic() > self.deadline:
                raise TemplateLimitError("it takes too long")

    def measure(self, value: Any, texts: bool) -> tuple[int, int]:
        """Walk `value` to its leaves, charging for each; gives (characters, depth).

        With `texts`, for what writing it out makes; else for its elements alone.
        """
        total, deepest = 0, 1
        stack: list[tuple[Any, int]] = [(value, 1)]
        while stack:
            item, depth = stack.pop()
            cost = ELEMENT_COST
            if isinstance(item, (*CONTAINERS, *_VIEWS)):
                deepest = max(deepest, depth)
                stack.extend((part, depth + 1) for part in item)
                if isinstance(item, dict):
                    stack.extend((part, depth + 1) for part in item.values())
            elif isinstance(item, (str, bytes)):
                cost += len(item) if texts or depth == 1 else 0
            elif isinstance(item, Namespace):
                raise SecurityError("a namespace can be neither written out nor put in a list")
            total += cost
            self.charge(cost)
        return total, deepest


def plain_size(values: Mapping[str, Any]) -> int:
    """Characters and elements of what a template is given, by which its budget grows."""
    budget = Budget(1 << 32, 10.0)  # ends on values that hold themselves
    return budget.measure(dict(values), True)[0]
