"""Questions whether a value is None: nothing notices `is` while it is traced, so the lines that ask are looked at."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any


@contextmanager
def none_tests(asked: Callable[[Any], None], ignored: frozenset[str]) -> Iterator[None]:
    """Say of what it is asked whether it is None, before it is.

    Args:
        asked: is called with the value of a variable before a line asks whether that, or a part of it, is None.
        ignored: packages whose code is not looked at.
    """

    def on_call(frame: FrameType, event: str, arg: Any) -> Any:
        if str(frame.f_globals.get("__name__", "torch")).partition(".")[0] in ignored:
            return None
        if isinstance(frame.f_locals.get("self"), dict):  # a result with names, which the graph makes anew
            return None
        return on_line if compared_with_none(frame.f_code) else None

    def on_line(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            for name in compared_with_none(frame.f_code).get(frame.f_lineno, ()):
                if name in frame.f_locals:
                    asked(frame.f_locals[name])
        return on_line

    previous = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(previous)


@functools.cache
def compared_with_none(code: CodeType) -> dict[int, tuple[str, ...]]:
    """The variables that a function compares with None, or of which it compares a part, by the line."""
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, TypeError):  # such as code that was generated, or a lambda in the middle of a line
        return {}
    result: dict[int, tuple[str, ...]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            variable = _variable(node.left)
            if variable is not None and isinstance(node.comparators[0], ast.Constant):
                line = first + node.lineno - 1
                result[line] = (*result.get(line, ()), variable)
    return result


def _variable(expression: ast.expr) -> str | None:
    while isinstance(expression, ast.Attribute | ast.Subscript):
        expression = expression.value
    return expression.id if isinstance(expression, ast.Name) else None
