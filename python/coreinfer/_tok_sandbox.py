"""A Jinja sandbox in which a hostile template can neither run long nor take much memory.

Jinja's own sandbox keeps templates away from Python's internals; this one adds a budget. Whatever
can make something big or take long is charged against it *before* it happens: loops, calls,
filters, operators, literals and output. What has no place in a chat template (inheritance,
includes, padding methods, filters that few use) is left out, so that the list of things to charge
stays short. `chat.ChatTemplate` is the one user; nothing here knows of messages.
"""

from __future__ import annotations

import functools
import html
import json
import re
import string
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import nodes, pass_context, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

ELEMENT_COST = 4  # an element of a list costs as much as four characters
MAX_INT_BITS = 4096
MAX_INDENT = 64
CLOCK_INTERVAL = 16  # charges between two looks at the clock

_STR_METHODS = """capitalize casefold count endswith find format index isalnum isalpha isdecimal
    isdigit islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix
    removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip
    swapcase title upper"""
_METHODS = {
    str: frozenset(_STR_METHODS.split()),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    float: frozenset(("is_integer",)),
}
_FILTERS = """abs capitalize count d default dictsort first float groupby items last length list
    lower map max min reject rejectattr reverse select selectattr sort string title trim truncate
    unique upper wordcount"""
_REFUSED = {
    nodes.Extends: "extends",
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "from ... import",
    nodes.Block: "block",
    nodes.EvalContextModifier: "autoescape",
}
_PERCENT_WIDTH = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(?:\*|\d{4,}|\d*\.(?:\*|\d{4,}))")
_CONTAINERS = (list, tuple, dict, set, frozenset)
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
            if isinstance(item, (*_CONTAINERS, *_VIEWS)):
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


class _FlatNamespace(Namespace):
    """Jinja's namespace, in which no namespace may hide: nested ones could grow without end."""

    def __init__(self, environment: Sandbox, *args: Any, **kwargs: Any) -> None:
        self.__environment = environment
        super().__init__(*args, **kwargs)
        environment.budget.measure(dict(*args, **kwargs), False)

    def __getattribute__(self, name: str) -> Any:
        if name == "_FlatNamespace__environment":
            return object.__getattribute__(self, name)
        return super().__getattribute__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.__environment.budget.measure([value], False)
        super().__setitem__(name, value)


class Generation(Extension):
    """``{% generation %}``, by which training tools mark replies: its body, as it stands."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """Compile with `load`, run inside ``with limits(...)``; one instance serves many threads."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_finalize,
            extensions=["jinja2.ext.loopcontrols", Generation],
        )
        self._state = threading.local()
        kept = {name: FILTERS[name] for name in _FILTERS.split() if name in FILTERS}
        kept |= {"format": _format, "indent": _indent, "int": _int, "join": _join}
        kept |= {"replace": _replace, "tojson": _tojson, "safe": str}
        kept |= {"string": _string, "escape": _escape, "e": _escape}
        self.filters = {name: self._charged(function) for name, function in kept.items()}
        self.globals["namespace"] = functools.partial(_FlatNamespace, self)
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]

    @property
    def budget(self) -> Budget:
        """The budget of this thread's run."""
        return self._state.budget

    def limits(self, work: int, seconds: float) -> _Limits:
        """A context manager within which this thread may compile and run a template."""
        return _Limits(self._state, Budget(work, seconds))

    def load(self, source: str) -> Any:
        """A template whose loops and literals charge the budget."""
        tree = _Charging(self).visit(self.parse(source))
        code = self.compile(tree)
        return self.template_class.from_code(self, code, self.make_globals(None))

    def tick(self, cost: int) -> str:
        """Charge for one turn of a loop or one call of a macro."""
        self.budget.charge(cost)
        return ""

    def guard(self, value: Any) -> Any:
        """Charge for a value that was just made, and hand it on."""
        if isinstance(value, (str, bytes)):
            self.budget.charge(len(value))
        elif isinstance(value, _CONTAINERS):
            self.budget.measure(value, False)
        elif isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise TemplateLimitError("a number grows too big")
        else:
            self.budget.charge(0)
        return value

    def text(self, value: Any) -> str:
        """`value` written out, charged beforehand."""
        if isinstance(value, str):
            self.budget.charge(len(value))
            return value
        self.budget.measure(value, True)
        return str(value)

    def join_text(self, *values: Any) -> str:
        """What ``~`` gives."""
        return "".join([self.text(value) for value in values])

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        if getattr(__obj, "__self__", None) is __self:
            return __obj(*args)  # put in by `_Charging`; Jinja adds keywords in loops
        __self.budget.charge(0)
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        kind = next((kind for kind in _METHODS if isinstance(owner, kind)), None)
        name = getattr(method, "__name__", "")
        if kind is None and type(method) is type("".join):
            raise SecurityError(f"{name!r} of a {type(owner).__name__} is not for templates")
        if kind is not None and name not in _METHODS[kind]:
            raise SecurityError(f"{name!r} of a {kind.__name__} is not for templates")
        if kind is str and name == "join":
            return _join(__self, args[0], owner)
        if kind is str and name == "replace":
            return _replace(__self, owner, *args)
        if kind is str and name == "format":
            given = [v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")]
            _check_format(__self, owner, [*args, *given])
        return __self.guard(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, bytes, list, tuple)) and isinstance(times, int):
                    self.budget.charge(len(many) * max(times, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > MAX_INT_BITS:
                raise TemplateLimitError("a number grows too big")
        elif operator == "%" and isinstance(left, str):
            _check_percent(self, left, right)
        return self.guard(super().call_binop(context, operator, left, right))

    def _charged(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            self.budget.charge(0)
            return self.guard(function(*args, **kwargs))

        return charged


class _Limits:
    def __init__(self, state: threading.local, budget: Budget) -> None:
        self._state, self._budget = state, budget

    def __enter__(self) -> Budget:
        self._state.budget = self._budget
        return self._budget

    def __exit__(self, *_: object) -> None:
        del self._state.budget


class _Charging(NodeTransformer):
    """Puts calls of `Sandbox.tick` and `Sandbox.guard` where a template can make work or size."""

    def __init__(self, environment: Sandbox) -> None:
        self._environment = environment

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        for kind, name in _REFUSED.items():
            if isinstance(node, kind):
                raise SecurityError(f"line {node.lineno}: {name!r} is not for chat templates")
        return super().generic_visit(node, *args, **kwargs)

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        if node.name in ("varargs", "kwargs"):
            raise SecurityError(f"line {node.lineno}: {node.name!r} is not for chat templates")
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._ticking(node)
        node.iter = self._call("guard", node.iter, [node.iter])
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._ticking(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("join_text", node, node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._guarded(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._guarded(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._guarded(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        slicing = isinstance(node.arg, nodes.Slice)
        return self._guarded(node) if slicing else self.generic_visit(node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._call("guard", node, [node.expr])
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        node.node = self._call("guard", node, [node.node])
        return node

    def _guarded(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return self._call("guard", node, [node])

    def _ticking(self, node: Any) -> nodes.Node:
        cost = sum(len(data.data) for part in node.body for data in _template_data(part))
        self.generic_visit(node)
        constant = nodes.Const(cost, lineno=node.lineno, environment=self._environment)
        tick = self._call("tick", node, [constant])
        statement = nodes.ExprStmt(tick, lineno=node.lineno, environment=self._environment)
        node.body.insert(0, statement)
        return node

    def _call(self, name: str, at: nodes.Node, args: list[nodes.Expr]) -> nodes.Call:
        place = {"lineno": at.lineno, "environment": self._environment}
        function = nodes.EnvironmentAttribute(name, **place)
        return nodes.Call(function, args, [], None, None, **place)


def _template_data(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        yield node
    yield from node.find_all(nodes.TemplateData)


@pass_context
def _finalize(context: Context, value: Any) -> str:
    return context.environment.text(value)  # type: ignore[attr-defined]


@pass_environment
def _string(environment: Sandbox, value: Any) -> str:
    return environment.text(value)


@pass_environment
def _escape(environment: Sandbox, value: Any) -> str:
    return html.escape(environment.text(value))


@pass_environment
def _join(environment: Sandbox, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    items = list(value)
    if attribute is not None:
        items = [make_attrgetter(environment, attribute)(item) for item in items]
    separator = environment.text(d)
    environment.budget.charge(len(separator) * len(items))
    return separator.join([environment.text(item) for item in items])


@pass_environment
def _replace(environment: Sandbox, s: Any, old: Any, new: Any, count: int | None = -1) -> str:
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
    _check_percent(environment, value, kwargs or args)
    return value % (kwargs or args)


def _check_percent(environment: Sandbox, template: str, values: Any) -> None:
    if _PERCENT_WIDTH.search(template):
        raise TemplateLimitError("a % format pads too wide")
    size, _ = environment.budget.measure(values, True)
    environment.budget.charge(len(template) + size * template.count("%"))


def _check_format(environment: Sandbox, template: str, values: list[Any]) -> None:
    size, _ = environment.budget.measure(values, True)
    for _, name, spec, _ in string.Formatter().parse(template):
        if name is not None and re.search(r"[.\[]", name):
            raise SecurityError("a format field may not look into its value")
        if spec and re.search(r"\{|\d{4,}", spec):
            raise TemplateLimitError("a format pads too wide")
        environment.budget.charge(size)


def _strftime_now(format: str) -> str:
    if re.search(r"%[^a-zA-Z%]*\d", format):
        raise TemplateLimitError("a date pads too wide")
    return datetime.now().strftime(format)


def plain_size(values: Mapping[str, Any]) -> int:
    """Characters and elements of what a template is given, by which its budget grows."""
    budget = Budget(1 << 32, 10.0)  # ends on values that hold themselves
    return budget.measure(dict(values), True)[0]
