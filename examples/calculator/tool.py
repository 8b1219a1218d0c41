"""The tool: a line of arithmetic in, its value out, until the input ends. ``python tool.py``, or ``command`` in a run.

What Python parses is walked over and never evaluated: there are numbers, + - * / // % ** and parentheses. It needs the
standard library alone. Whoever starts it sets its limits.
"""

from __future__ import annotations

import ast
import math
import operator
import sys
from collections.abc import Callable
from typing import Any

BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}


def value(node: ast.expr) -> int | float | complex:
    """Raises SyntaxError for what is not arithmetic, ArithmeticError for what has no value worth waiting for."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        return UNARY[type(node.op)](value(node.operand))  # type: ignore[no-any-return]
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        left, right = value(node.left), value(node.right)
        if isinstance(node.op, ast.Pow) and (abs(right) > 64 or abs(left) > 10**9):
            raise OverflowError
        return BINARY[type(node.op)](left, right)  # type: ignore[no-any-return]
    raise SyntaxError


def answer(text: str) -> str:
    """The value, whole where it is whole, or a line that begins with "error"."""
    try:
        number = value(ast.parse(text.strip(), mode="eval").body)
        if isinstance(number, complex) or not math.isfinite(number):
            return "error: no such number"
        return str(int(number) if number == int(number) else number)
    except ZeroDivisionError:
        return "error: division by zero"
    except OverflowError:
        return "error: too large"
    except Exception:  # whatever the policy wrote, it gets an answer
        return "error: malformed"


if __name__ == "__main__":
    for line in sys.stdin:
        print(answer(line), flush=True)
