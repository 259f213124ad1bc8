"""Sizes that follow from others: ``height * width``, ``(length - 1) // 2 + 1``. Plain Python: Triton's front carries it, too.

An expression has integers, names, ``+ - * // %``, a minus in front, parentheses, and ``min`` and ``max`` of some; division
rounds down. The C++ runtime reads the same (runtime/src/arithmetic.cpp): tests/arithmetic_cases.json holds both to it.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from functools import lru_cache

from bca_deploy.errors import InputError

_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CALLS: dict[str, Callable[..., int]] = {"min": min, "max": max}
#: What may stand in an expression. Python itself reads more: 0x10, 1_000, line breaks, a comma at the end, (min)(a, b).
_TOKENS = re.compile(r"(?: |//|[-+*%(]|\)(?! *\()|,(?! *\))|(?:0|[1-9][0-9]*+)(?!\w)|[^\W\d]\w*+)*+")
#: It bounds how deep an expression nests, too.
_LONGEST_BYTES = 400
#: Sizes are below it: C++ counts in int64.
LIMIT = 2**63


def names_in(expression: str) -> frozenset[str]:
    """Return the names that an expression needs.

    Raises:
        InputError: it is none.
    """
    functions = {node.func for node in ast.walk(_parsed(expression)) if isinstance(node, ast.Call)}
    return frozenset(n.id for n in ast.walk(_parsed(expression)) if isinstance(n, ast.Name) and n not in functions)


def value_of(expression: str, sizes: Mapping[str, int]) -> int:
    """Return what an expression is at these sizes.

    Raises:
        InputError: it is none, it divides by 0, it is below 0, or more than 64 bits hold on the way.
        KeyError: a size that it needs is not there.
    """
    try:
        value = _value(_parsed(expression), sizes)
    except ZeroDivisionError:
        raise _fault(expression, "divides by 0", sizes) from None
    except OverflowError:
        raise _fault(expression, "is more than 64 bits hold", sizes) from None
    if value < 0:
        raise _fault(expression, f"is {value}, below 0,", sizes)
    return value


def _fault(expression: str, what: str, sizes: Mapping[str, int]) -> InputError:
    where = ", ".join(f"{name} {sizes[name]}" for name in sorted(names_in(expression)))
    return InputError(f"{expression!r} {what} at {where or 'any sizes'}; give other sizes")


@lru_cache(maxsize=1000)
def _parsed(expression: str) -> ast.expr:
    try:
        _check_text(expression)
        body = ast.parse(expression.strip(" "), mode="eval").body
        _check(body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{expression!r} is no size: give a number, a dimension, or an expression of them with + - * // %, min, max and "
            f"parentheses, of at most {_LONGEST_BYTES} bytes"
        ) from error
    return body


def _check_text(expression: str) -> None:
    if len(expression.encode()) > _LONGEST_BYTES or not _TOKENS.fullmatch(expression):
        raise ValueError(expression)


def _check(node: ast.expr) -> None:
    for part in ast.walk(node):
        allowed = (
            isinstance(part, ast.Name | ast.expr_context)
            or (isinstance(part, ast.Constant) and type(part.value) is int and part.value < LIMIT)
            or (isinstance(part, ast.BinOp) and type(part.op) in _BINARY)
            or (isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.USub))
            or isinstance(part, ast.operator | ast.unaryop)
            or (isinstance(part, ast.Call) and _is_known(part))
        )
        if not allowed:
            raise ValueError(type(part).__name__)


def _is_known(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in _CALLS and len(call.args) > 1 and not call.keywords


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant):
        return int(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp):
        return _held(_BINARY[type(node.op)](_value(node.left, sizes), _value(node.right, sizes)))
    if isinstance(node, ast.UnaryOp):
        return _held(-_value(node.operand, sizes))
    assert isinstance(node, ast.Call)  # noqa: S101  (nothing else passes the check)
    assert isinstance(node.func, ast.Name)  # noqa: S101
    return _CALLS[node.func.id](*(_value(argument, sizes) for argument in node.args))


def _held(value: int) -> int:
    if not -LIMIT <= value < LIMIT:
        raise OverflowError
    return value
