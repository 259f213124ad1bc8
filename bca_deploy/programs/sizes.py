"""The sizes that an exported program was made for, held against those that are declared."""

import ast
import itertools
import keyword
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from bca_deploy.errors import ExportError, InputError
from bca_deploy.signature import Axis, Dims
from bca_deploy.tracing.narrowing import Condition, FloorDiv, narrowings, symbol

#: Of each input, for each axis its size: a number, or an expression of torch's symbols.
Shapes = Mapping[str, tuple[sympy.Basic, ...]]

_WHERE = "the exported program (line unknown)"
# torch has 2 for every size that may vary, and takes 1 all the same.
_NO_LIMIT = 2
_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")


def _rounded(over: sympy.Basic, under: sympy.Basic) -> sympy.Basic:
    both = isinstance(over, sympy.Integer) and isinstance(under, sympy.Integer)
    return sympy.Integer(int(over) // int(under)) if both else FloorDiv(over, under)


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
    ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le,
    ast.Gt: sympy.Gt,
    ast.GtE: sympy.Ge,
    ast.And: sympy.And,
    ast.Or: sympy.Or,
    ast.Not: sympy.Not,
    ast.USub: operator.neg,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.Mod: sympy.Mod,
    ast.FloorDiv: _rounded,
}


def shape_of(value: Any) -> tuple[sympy.Basic, ...]:
    """Return the sizes of what stands for a tensor in a program."""
    return tuple(sympy.Integer(n) if isinstance(n, int) else n.node.expr for n in value.shape)


@dataclass(frozen=True)
class Sizes:
    """What a program's inputs must be.

    Attributes:
        shapes: of the inputs.
        ranges: of torch's symbols, the smallest and the largest size; None where there is no largest.
        guards: what else must hold, in torch's words.
    """

    shapes: Shapes
    ranges: Mapping[sympy.Symbol, tuple[int, int | None]]
    guards: tuple[str, ...]

    def check(self, axes: Mapping[str, tuple[Axis, ...]], dims: Dims) -> None:
        """Refuse declared sizes that the program was not made for.

        Raises:
            ExportError: naming the input and its axis, or the dimension and the condition.
        """
        for name, found in axes.items():
            _check_fixed(name, found, self.shapes[name])
        told = [each.text for each in narrowings(self._conditions(axes), dims) if not each.doubtful]
        if told:
            lines = "".join(f"\n- {text}" for text in told)
            raise ExportError(f"the file is not the model at every declared size ({dims}):{lines}")

    def hold(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Refuse sizes out of range; where the inputs are being traced, have torch know the range.

        Raises:
            InputError: naming the axis.
        """
        for name, tensor in inputs.items():
            for at, size in enumerate(self.shapes[name]):
                low, high = self.ranges.get(size, (0, None))
                if (low > _NO_LIMIT and tensor.shape[at] < low) or (high is not None and tensor.shape[at] > high):
                    raise InputError(
                        f"axis {at} of {name} is {tensor.shape[at]}, and the file holds for {low} to {high or 'any'}"
                    )

    def _conditions(self, axes: Mapping[str, tuple[Axis, ...]]) -> Iterator[Condition]:
        names: dict[sympy.Basic, sympy.Basic] = {}
        places: dict[sympy.Basic, str] = {}
        for name, at, axis in [(of, at, axis) for of, found in axes.items() for at, axis in enumerate(found)]:
            size, declared = self.shapes[name][at], symbol(axis) if isinstance(axis, str) else sympy.Integer(axis)
            here = f"{name}.shape[{at}]"
            if size not in names and isinstance(size, sympy.Symbol):
                names[size], places[size] = declared, here
            elif (told := sympy.Eq(size.xreplace(names), declared)) is not sympy.true:
                yield _condition(told, f"{here} == {places.get(size, size)}")
        for size, (low, high) in self.ranges.items():
            if size in names and low > _NO_LIMIT:
                yield _condition(sympy.Ge(names[size], low), f"{places[size]} >= {low}")
            if size in names and high is not None:
                yield _condition(sympy.Le(names[size], high), f"{places[size]} <= {high}")
        for text in self.guards:
            guard = _read(text, axes)
            if not isinstance(guard, sympy.Ne):  # torch notes them where nothing depends on it
                yield _condition(guard, text)


def _condition(expr: sympy.Basic, text: str) -> Condition:
    if expr is sympy.false:
        said = _SIZE.sub(lambda match: f"{match[1]}.shape[{match[2]}]", text)
        raise ExportError(f"the axes that are declared are not those of the file: {_WHERE} works only where {said}")
    return Condition(expr, _WHERE)


def _check_fixed(name: str, axes: tuple[Axis, ...], shape: tuple[sympy.Basic, ...]) -> None:
    if len(axes) != len(shape):
        raise ExportError(f"{name} has {len(axes)} axes in the samples, and {len(shape)} in the file")
    for at, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        if isinstance(size, sympy.Integer) and axis != size:
            raise ExportError(
                f"axis {at} of {name} is {axis} here, and the file fixes it at {size}; give samples of that size alone, or "
                f"export the program again with dynamic_shapes={{'{name}': {{{at}: torch.export.Dim.AUTO}}}}"
            )


def _read(text: str, axes: Mapping[str, tuple[Axis, ...]]) -> sympy.Basic:
    """Read a condition on sizes; what is written in a file is never run."""
    try:
        named = _SIZE.sub(lambda match: _word(axes[match[1]][int(match[2])]), text)
        return _expression(ast.parse(named, mode="eval").body)
    except (SyntaxError, LookupError, TypeError, ValueError):
        raise ExportError(
            f"the file holds only where {text}, which is not understood; give the code that made it, --model "
            "pkg.module:factory, or export it again without that condition"
        ) from None


def _word(axis: Axis) -> str:
    if isinstance(axis, str) and keyword.iskeyword(axis):
        raise ValueError(axis)
    return str(axis)


def _expression(node: ast.AST) -> Any:
    match node:
        case ast.Constant(value=bool() | int() as value):
            return sympy.sympify(value)
        case ast.Name(id=name):
            return symbol(name)
        case ast.UnaryOp(op=op, operand=operand):
            return _OPERATORS[type(op)](_expression(operand))
        case ast.BinOp(op=op, left=left, right=right):
            return _OPERATORS[type(op)](_expression(left), _expression(right))
        case ast.BoolOp(op=op, values=values):
            return _OPERATORS[type(op)](*map(_expression, values))
        case ast.Compare(left=left, ops=ops, comparators=right):
            pairs = itertools.pairwise(map(_expression, [left, *right]))
            return sympy.And(*(_OPERATORS[type(op)](*pair) for op, pair in zip(ops, pairs, strict=True)))
        case _:
            raise ValueError(ast.dump(node))


def sizes_of(exported: torch.export.ExportedProgram, shapes: Shapes) -> Sizes:
    """Return what a program asks of the sizes of its inputs."""
    ranges = {
        size: (int(r.lower), int(r.upper) if isinstance(r.upper, sympy.Integer) else None)
        for size, r in exported.range_constraints.items()
        if isinstance(r.lower, sympy.Integer)
    }
    return Sizes(shapes, ranges, tuple(getattr(exported, "_guards_code", ())))  # private; a test holds that it is there
