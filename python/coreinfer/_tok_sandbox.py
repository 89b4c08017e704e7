"""A Jinja sandbox in which a hostile template can neither run long nor take much memory.

Jinja's own sandbox keeps templates away from Python's internals; this one adds a budget
(`_tok_budget.py`). Whatever can make something big or take long is charged against it *before* it
happens: loops, calls, filters, operators, literals and output. What has no place in a chat
template (inheritance, includes, padding methods) is left out, so that the list of things to charge
stays short. `chat.ChatTemplate` is the one user; nothing here knows of messages.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ._tok_budget import CONTAINERS, Budget, TemplateLimitError
from ._tok_filters import (
    CHARGED,
    KEPT,
    MAX_INT_BITS,
    WRITING,
    check_format,
    check_percent,
    join,
    raise_exception,
    replace,
    strftime_now,
)

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
_REFUSED = {
    nodes.Extends: "extends",
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "from ... import",
    nodes.Block: "block",
    nodes.EvalContextModifier: "autoescape",
}


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
        self.filters = {name: self._charged(f, False) for name, f in (KEPT | CHARGED).items()}
        self.filters |= {name: self._charged(f, True) for name, f in WRITING.items()}
        for name in ("lower", "upper", "escaped"):  # tests that write out whatever they are given
            del self.tests[name]
        self.globals["raise_exception"] = raise_exception
        self.globals["namespace"] = functools.partial(_FlatNamespace, self)
        self.globals["strftime_now"] = strftime_now
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
        elif isinstance(value, CONTAINERS):
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
        if kind is not None:
            __self._charge_texts(args)  # what is not found is written into an error
        if kind is str and name == "join":
            return join(__self, args[0], owner)
        if kind is str and name == "replace":
            return replace(__self, owner, *args)
        if kind is str and name == "format":
            given = [v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")]
            check_format(__self, owner, [*args, *given])
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
            check_percent(self, left, right)
        return self.guard(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._charge_texts([argument])  # a key that is missing is written into an error
        return super().getitem(obj, argument)

    def _charge_texts(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, CONTAINERS):
                self.budget.measure(value, True)

    def _charged(self, function: Callable[..., Any], writes: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            self.budget.charge(0)
            if writes:
                args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
                self._charge_texts(args)
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
