"""The Jinja environment that chat templates run in: Hugging Face's names, in a bounded sandbox.

Templates come from strangers with the model. Python's attributes are closed to them (Jinja's
sandbox), and loops, calls and operators have bounds, so that none hangs the process by an honest
mistake or a simple trick. It is no prison: a hostile model should not be run at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 500_000
"""Loop rounds and calls of one rendering; a call of a macro counts as ten."""
MAX_SIZE = 2**24
"""Characters of the result, and length of any text or list that an operator makes."""
_MAX_BITS = 2**16
_STEPS = "steps!"  # no template can name, and so change, this variable


def compile_template(source: str) -> jinja2.Template:
    """The program of a template's source. Raises ``jinja2.TemplateSyntaxError``."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters |= {
        "tojson": _to_json,
        "from_json": json.loads,
        "_counted": _counted,
        "_joined": _joined,
        "_changed": _changed,
    }
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    tree = _Bounds().visit(environment.parse(source))
    code = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))


def run(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text that a template makes; raises what it raises, and ``SecurityError`` at a bound."""
    pieces: list[str] = []
    size = 0
    for piece in template.generate({**variables, _STEPS: _Steps()}):
        size += len(piece)
        _check_size(size)
        pieces.append(piece)
    return "".join(pieces)


class _Steps:
    """Counts down the work of one rendering."""

    def __init__(self) -> None:
        self.left = MAX_STEPS

    def take(self, steps: int = 1) -> None:
        self.left -= steps
        if self.left < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")


class _Sandbox(SandboxedEnvironment):
    """Jinja's sandbox, with bounds. What a template changes are copies, so it may change them."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __context.parent[_STEPS].take(10 if isinstance(__obj, Macro) else 1)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
            if bits > _MAX_BITS:
                raise SecurityError("a number grows too large")
        elif operator == "*":
            _check_size(_length(left) * _length(right))
        elif operator == "+":
            _check_size(_length(left) + _length(right))
        return super().call_binop(context, operator, left, right)


def _length(value: Any) -> int:
    if isinstance(value, (str, list, tuple)):
        return len(value)
    return value if isinstance(value, int) else 1


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"it makes more than {MAX_SIZE} characters or items")


class _Bounds(NodeTransformer):
    """Counts the rounds of every loop, and checks the size of every joined text."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None)
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:  # noqa: N802
        """``set a.b = c``: of a dictionary too, which some templates need and llama.cpp allows."""
        self.generic_visit(node)
        if not isinstance(node.target, nodes.NSRef):
            return node
        owner = nodes.Name(node.target.name, "load")
        arguments = [nodes.Const(node.target.attr), node.node]
        change = nodes.Filter(owner, "_changed", arguments, [], None, None)
        return nodes.ExprStmt(change).set_lineno(node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "_joined", [], [], None, None)


class _Generation(Extension):
    """``{% generation %}``: marks the assistant's words for training; here its content as it is."""

    tags = {"generation"}  # noqa: RUF012 - so declared by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@jinja2.pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterable[Any]:
    steps: _Steps = context.parent[_STEPS]

    def rounds() -> Iterator[Any]:
        for item in items:
            steps.take()
            yield item

    return rounds()


def _changed(owner: Any, name: str, value: Any) -> None:
    if not isinstance(owner, (Namespace, dict)):
        raise jinja2.TemplateRuntimeError(f"cannot set {name!r} of a {type(owner).__name__}")
    owner[name] = value


def _joined(items: list[Any]) -> str:
    texts = [str(item) for item in items]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_listed,
    )


def _listed(value: Any) -> list[Any]:
    """What a filter such as ``map`` gives."""
    if not isinstance(value, Iterator):
        raise TypeError(f"a {type(value).__name__} is not JSON")
    return list(value)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)
