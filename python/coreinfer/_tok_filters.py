"""The filters of chat templates, and the format and date functions, each charged beforehand.

`KEPT` are Jinja's own, which make nothing bigger than what they are given; `WRITING` are those of
them that write it out as text (or, to compare, parts of it) and are charged for that; `CHARGED`
replace those that could make more. What is in none has no place in a chat template.
"""

from __future__ import annotations

import html
import json
import re
import string
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import pass_environment
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS, make_attrgetter

from ._tok_budget import TemplateLimitError

if TYPE_CHECKING:
    from ._tok_sandbox import Sandbox

MAX_INT_BITS = 4096
MAX_INDENT = 64
_KEPT_NAMES = """abs count d default first float items last length list map reject rejectattr
    reverse select selectattr"""
_WRITING_NAMES = """capitalize dictsort groupby lower max min sort title trim truncate unique upper
    wordcount"""
KEPT = {name: FILTERS[name] for name in _KEPT_NAMES.split() if name in FILTERS}
WRITING = {name: FILTERS[name] for name in _WRITING_NAMES.split()}
_PERCENT_WIDTH = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(?:\*|\d{4,}|\d*\.(?:\*|\d{4,}))")


class RefusedError(Exception):
    """The template itself refuses what it was given."""


@pass_environment
def _string(environment: Sandbox, value: Any) -> str:
    return environment.text(value)


@pass_environment
def _escape(environment: Sandbox, value: Any) -> str:
    return html.escape(environment.text(value))


@pass_environment
def join(environment: Sandbox, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    items = list(value)
    if attribute is not None:
        items = [make_attrgetter(environment, attribute)(item) for item in items]
    separator = environment.text(d)
    environment.budget.charge(len(separator) * len(items))
    return separator.join([environment.text(item) for item in items])


@pass_environment
def replace(environment: Sandbox, s: Any, old: Any, new: Any, count: int | None = -1) -> str:
    s, old, new = environment.text(s), environment.text(old), environment.text(new)
    count = -1 if count is None else count
    found = s.count(old) if count < 0 else min(count, s.count(old))
    environment.budget.charge(found * len(new))
    return s.replace(old, new, count)


@pass_environment
def _indent(environment: Sandbox, s: Any, width: Any = 4, first: bool = False, blank: bool = False):
    s = environment.text(s)
    size = len(width) if isinstance(width, str) else width
    if not isinstance(size, int) or size > MAX_INDENT:
        raise TemplateLimitError(f"indent is wider than {MAX_INDENT}")
    environment.budget.charge(len(s) + (s.count("\n") + 1) * max(size, 0))
    return FILTERS["indent"](s, width, first, blank)


@pass_environment
def _int(environment: Sandbox, value: Any, default: int = 0, base: int = 10) -> int:
    if isinstance(value, (str, bytes)) and len(value) > MAX_INT_BITS // 4:
        raise TemplateLimitError("a number grows too big")
    return FILTERS["int"](value, default, base)


@pass_environment
def _tojson(
    environment: Sandbox,
    value: Any,
    indent: Any = None,
    ensure_ascii: bool = False,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    size, depth = environment.budget.measure(value, True)
    width = len(indent) if isinstance(indent, str) else indent or 0
    if not isinstance(width, int) or width > MAX_INDENT:
        raise TemplateLimitError(f"indent is wider than {MAX_INDENT}")
    environment.budget.charge(size * width * depth)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=tuple(separators) if separators is not None else None,
        sort_keys=sort_keys,
    )


@pass_environment
def _format(environment: Sandbox, value: Any, *args: Any, **kwargs: Any) -> str:
    value = environment.text(value)
    check_percent(environment, value, kwargs or args)
    return value % (kwargs or args)


def check_percent(environment: Sandbox, template: str, values: Any) -> None:
    if _PERCENT_WIDTH.search(template):
        raise TemplateLimitError("a % format pads too wide")
    size, _ = environment.budget.measure(values, True)
    environment.budget.charge(len(template) + size * template.count("%"))


def check_format(environment: Sandbox, template: str, values: list[Any]) -> None:
    size, _ = environment.budget.measure(values, True)
    for _, name, spec, _ in string.Formatter().parse(template):
        if name is not None and re.search(r"[.\[]", name):
            raise SecurityError("a format field may not look into its value")
        if spec and re.search(r"\{|\d{4,}", spec):
            raise TemplateLimitError("a format pads too wide")
        environment.budget.charge(size)


def strftime_now(format: str) -> str:
    if re.search(r"%[^a-zA-Z%]*\d", format):
        raise TemplateLimitError("a date pads too wide")
    return datetime.now().strftime(format)


@pass_environment
def raise_exception(environment: Sandbox, message: Any = "") -> None:
    """What templates call to refuse messages."""
    raise RefusedError(environment.text(message))


CHARGED = {
    "escape": _escape,
    "e": _escape,
    "format": _format,
    "indent": _indent,
    "int": _int,
    "join": join,
    "replace": replace,
    "safe": str,
    "string": _string,
    "tojson": _tojson,
}
