"""What a trace holds for, in plain words: conditions on its sizes, settled over the declared ranges.

Requires expressions whose symbols are named as the dimensions are. Ensures that a condition which every declared size meets
is not told, and that two which say the same are told once. One dimension is settled at every size that it may have; several at
once on a grid of the smallest, the optimal and the largest with their neighbours, odd and even, equal and different.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import sympy  # type: ignore[import-untyped]
from sympy.printing.precedence import PRECEDENCE  # type: ignore[import-untyped]
from sympy.printing.str import StrPrinter  # type: ignore[import-untyped]

from bca_deploy.arithmetic import names_in
from bca_deploy.errors import InputError
from bca_deploy.signature import Axis, DimRange, Dims

# Tried of one dimension, and of several together; above, only the ends are.
_SIZES, _POINTS = 2**16, 20_000
# What is to be run for one that is doubtful.
_TRIES = 3

# torch's own functions on sizes, found by the names of their classes.
_ROUNDED: dict[str, Callable[..., object]] = {"TruncToInt": math.trunc, "FloorToInt": math.floor, "CeilToInt": math.ceil}
_FUNCTIONS: dict[str, Callable[..., object]] = {
    **_ROUNDED,
    "RoundToInt": round,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "PythonMod": operator.mod,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "PowByNatural": operator.pow,
    "FloatPow": operator.pow,
    "ToFloat": float,
    "OpaqueUnaryFn_sqrt": math.sqrt,
    "min": min,
    "max": max,
}
_WRITABLE = {"Symbol", "Add", "Mul", "FloorDiv", "CleanDiv", "Mod", "PythonMod", "Min", "Max", "Pow", "PowByNatural"}

_Point = tuple[int, ...]


@dataclass(frozen=True)
class Condition:
    """What must hold of the sizes for the trace to be the model.

    Attributes:
        expr: over symbols that are named as the dimensions.
        where: the line of the model's code that it comes from, such as ``model.py:41``; empty where none is known.
        asked: whether that line asks it itself, as an ``if`` does, and no library on its behalf.
    """

    expr: sympy.Basic
    where: str = ""
    asked: bool = False

    @property
    def because(self) -> str:
        """What makes it needed, in words."""
        said = _Python().doprint(_in_whole_numbers(self.expr))
        if self.asked:
            return f"the model branches on {said} in {self.where}"
        return f"{self.where or 'the traced graph'} works only where {said}"


@dataclass(frozen=True)
class Narrowing:
    """A condition that some of the declared sizes do not meet.

    Attributes:
        names: the dimensions that it is about.
        failing: their sizes that do not meet it.
        where: as the condition's.
        text: one sentence: which sizes, why, and what to do.
        doubtful: whether the trace may hold for them all the same: torch, or a library, tells one size from the rest (1 most
            often, or two that are equal) where nothing may depend on it.
    """

    names: tuple[str, ...]
    failing: frozenset[_Point]
    where: str
    text: str
    doubtful: bool

    @property
    def tries(self) -> tuple[dict[str, int], ...]:
        """Return sizes that show whether it holds, the smallest first; dimensions that are not there may have any."""
        return tuple(dict(zip(self.names, point, strict=True)) for point in sorted(self.failing)[:_TRIES])

    def told_by(self, other: "Narrowing") -> bool:
        """Whether the other says as much of the same line; what is known of no line is told by any."""
        return self.names == other.names and self.failing <= other.failing and self.where in ("", other.where)


def symbol(name: str) -> sympy.Symbol:
    """Return the symbol of a dimension."""
    return sympy.Symbol(name, integer=True, positive=True)


def narrowings(conditions: Iterable[Condition], dims: Dims) -> list[Narrowing]:
    """Return what the declared sizes do not meet, in the order of the conditions, each once."""
    found: list[Narrowing] = []
    for condition in dict.fromkeys(conditions):
        new = _settled(condition, dims)
        if new and not any(new.told_by(old) for old in found):
            found.append(new)
    return found


def axis(size: sympy.Basic, dims: Dims) -> Axis | None:
    """Write a size as a number, a name, or an expression that :mod:`bca_deploy.arithmetic` reads.

    Returns:
        None where that cannot be done with the same result at every size.
    """
    if isinstance(size, sympy.Integer):
        return int(size)
    whole = _in_whole_numbers(size)
    for node in sympy.preorder_traversal(whole):
        if not isinstance(node, sympy.Integer) and type(node).__name__ not in _WRITABLE:
            return None
    names = _names(size)
    computed, written = _computed(names, size), _computed(names, whole)
    if whole != size and any(computed(*point) != written(*point) for point in _points(names, dims)):
        return None
    text = str(_Python().doprint(whole))
    try:
        return text if names_in(text) == set(names) else None
    except InputError:  # too long
        return None


# ---- settling


def _settled(condition: Condition, dims: Dims) -> Narrowing | None:
    names = _names(condition.expr)
    if not names or not set(names) <= set(dims):  # of the data's sizes: no range is declared
        return None
    holds = _but_for_zero(_computed(names, condition.expr))
    table = {point: bool(holds(*point)) for point in _points(names, dims)}
    if all(table.values()):
        return None
    matters = [at for at in range(len(names)) if _matters(table, at)]
    if len(names) > 1 and len(matters) == 1:
        at = matters[0]
        others = tuple(dims[name].opt for name in names)
        table = {(size,): bool(holds(*others[:at], size, *others[at + 1 :])) for size in _line(dims[names[at]])}
        names = (names[at],)
    failing = frozenset(point for point, held in table.items() if not held)
    text = _of_one(condition, dims, names[0], table) if len(names) == 1 else _of_several(condition, names, table)
    doubtful = all(1 in point for point in failing) or (isinstance(condition.expr, sympy.Ne) and not condition.asked)
    return Narrowing(names, failing, condition.where, text, doubtful)


def _names(expr: sympy.Basic) -> tuple[str, ...]:
    return tuple(sorted(str(each) for each in expr.free_symbols))


def _computed(names: Sequence[str], expr: sympy.Basic) -> Callable[..., object]:
    """Return a function of the sizes; of what is written, so that this is what was tried."""
    symbols = [symbol(name) for name in names]
    functions = {type(node).__name__ for node in sympy.preorder_traversal(expr) if isinstance(node, sympy.Function)}
    if not functions <= {*_FUNCTIONS, *_WRITABLE}:  # a rare one of torch's: slower, by sympy
        return lambda *sizes: expr.xreplace(dict(zip(symbols, map(sympy.Integer, sizes), strict=True)))
    computed: Callable[..., object] = sympy.lambdify(symbols, expr, modules=[_FUNCTIONS], printer=_Python())
    return computed


def _but_for_zero(holds: Callable[..., object]) -> Callable[..., object]:
    """A condition that divides by a size's half, or such, does not hold where that is zero."""

    def held(*sizes: int) -> object:
        try:
            return holds(*sizes)
        except ZeroDivisionError:
            return False

    return held


def _line(size: DimRange) -> Sequence[int]:
    if size.max - size.min < _SIZES:
        return range(size.min, size.max + 1)
    return [*range(size.min, size.min + _SIZES // 2), *range(size.max - _SIZES // 2, size.max + 1)]


def _points(names: Sequence[str], dims: Dims) -> Iterable[_Point]:
    if len(names) == 1:
        return ((size,) for size in _line(dims[names[0]]))
    few = int(_POINTS ** (1 / max(len(names), 1)))
    return itertools.product(*(_some(name, names, dims)[:few] for name in names))


def _some(name: str, names: Sequence[str], dims: Dims) -> list[int]:
    """Return sizes of one dimension, its own first, then the others': equal ones must meet."""
    own = dims[name]
    ranges = [own, *(dims[other] for other in names if other != name)]
    tried = [size for r in ranges for size in (r.min, r.max, r.opt, r.min + 1, r.opt + 1, r.max - 1, r.min + 2, r.min + 3)]
    return list(dict.fromkeys(size for size in tried if own.min <= size <= own.max))


def _matters(table: dict[_Point, bool], at: int) -> bool:
    """Whether the size at this place changes what holds, all others as they are."""
    seen: dict[_Point, bool] = {}
    return any(seen.setdefault(point[:at] + point[at + 1 :], held) != held for point, held in table.items())


# ---- in words


def _of_one(condition: Condition, dims: Dims, name: str, table: dict[_Point, bool]) -> str:
    holding, failing = ([point[0] for point, held in table.items() if held is wanted] for wanted in (True, False))
    if (constant := _constant(condition.expr)) is not None:
        what, number = constant
        sizes = f"other than {number}" if what == name else _spans(failing)
        return (
            f"{name} {sizes}: {what} became the constant {number} in {condition.where or 'the trace'} (by int(), len() or "
            "range() of it, a loop over it, or a weight of that size); use the size as it is, or give the input that fixed size"
        )
    if len(runs := _runs(holding)) == 1:
        low, high = runs[0]
        declared = f"{name}={low}:{min(max(dims[name].opt, low), high)}:{high}"
        return f"{name} {_spans(failing)}: {condition.because}; declare `--dim {declared}`, or rewrite it for every size"
    if (step := _step(holding, failing)) is not None:
        told = f"that is no multiple of {step}: {condition.because}; pad it to one before the model"
        return f"{name} {told}, or rewrite it for every size"
    return f"{name} {_spans(failing)}: {condition.because}; rewrite it for every size"


def _of_several(condition: Condition, names: Sequence[str], table: dict[_Point, bool]) -> str:
    if len(names) == 2 and all(held == (one == other) for (one, other), held in table.items()):
        pair = " and ".join(names)
        return f"{pair} must be equal: {condition.because}; give both one name, or rewrite it for different sizes"
    if len(names) == 2 and all(held == (one != other) for (one, other), held in table.items()):
        return f"{names[0]} equal to {names[1]}: {condition.because}; rewrite it for equal sizes, too"
    point = min(point for point, held in table.items() if not held)
    sizes = ", ".join(f"{name} {size}" for name, size in zip(names, point, strict=True))
    return f"sizes such as {sizes}: {condition.because}; rewrite it for every size"


def _constant(expr: sympy.Basic) -> tuple[str, int] | None:
    """Return what must equal one number, but for a remainder, and the number."""
    if not isinstance(expr, sympy.Eq) or not any(isinstance(side, sympy.Integer) for side in expr.args):
        return None
    number, what = sorted(expr.args, key=lambda side: not isinstance(side, sympy.Integer))
    return None if "Mod" in type(what).__name__ else (_Python().doprint(_in_whole_numbers(what)), int(number))


def _runs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and the last of each run of neighbours."""
    starts = [size for at, size in enumerate(sizes) if at == 0 or sizes[at - 1] != size - 1]
    ends = [size for at, size in enumerate(sizes) if at + 1 == len(sizes) or sizes[at + 1] != size + 1]
    return list(zip(starts, ends, strict=True))


def _spans(sizes: Sequence[int]) -> str:
    """Write ``1 to 4 and 9``, or a few examples where they are scattered."""
    runs = _runs(sizes)
    if len(runs) > 3:
        return f"such as {', '.join(map(str, sizes[:3]))}"
    return " and ".join(str(low) if low == high else f"{low} to {high}" for low, high in runs)


def _step(holding: Sequence[int], failing: Sequence[int]) -> int | None:
    """Return of what the sizes that hold are the multiples."""
    step = math.gcd(*holding)
    return step if step > 1 and all(size % step for size in failing) else None


# ---- writing sizes


class FloorDiv(sympy.Function):  # type: ignore[misc]
    """A quotient rounded down; where torch rounds a real number, this is written."""

    precedence = PRECEDENCE["Relational"]  # torch's has this: whatever holds it puts it in brackets


def _in_whole_numbers(size: sympy.Basic) -> sympy.Basic:
    """Write a rounded fraction, such as half a length that a resize gives, as a division of whole numbers."""

    def named(name: str) -> Callable[[sympy.Basic], bool]:
        return lambda node: type(node).__name__ == name

    def divided(node: sympy.Basic) -> sympy.Basic:
        inner = node.args[0].replace(named("ToFloat"), lambda each: each.args[0])
        inner = inner.replace(named("IntTrueDiv"), lambda each: each.args[0] / each.args[1])
        over, under = sympy.fraction(sympy.together(sympy.nsimplify(inner, rational=True)))
        return -FloorDiv(-over, under) if type(node).__name__ == "CeilToInt" else FloorDiv(over, under)

    return size.replace(lambda node: type(node).__name__ in _ROUNDED, divided)


class _Python(StrPrinter):  # type: ignore[misc]
    """Sizes and what is asked of them, as Python writes them."""

    printmethod = "_as_python"  # of an expression: torch's have sympy's for another purpose

    def _infix(self, sign: str, expr: sympy.Basic) -> str:
        return sign.join(self.parenthesize(each, PRECEDENCE["Pow"]) for each in expr.args)

    def _print_FloorDiv(self, expr: sympy.Basic) -> str:  # noqa: N802  (sympy calls these by the names of classes)
        return self._infix(" // ", expr)

    def _print_Mod(self, expr: sympy.Basic) -> str:  # noqa: N802
        return self._infix(" % ", expr)

    _print_PythonMod = _print_Mod  # noqa: N815

    def _print_Pow(self, expr: sympy.Basic, rational: bool = False) -> str:  # noqa: N802
        base, power = expr.args
        if isinstance(power, sympy.Integer) and power > 1:
            return "*".join([self.parenthesize(base, PRECEDENCE["Pow"])] * int(power))
        return str(super()._print_Pow(expr, rational))

    _print_PowByNatural = _print_Pow  # noqa: N815

    def _print_Min(self, expr: sympy.Basic) -> str:  # noqa: N802
        return f"min({self.stringify(expr.args, ', ')})"

    def _print_Max(self, expr: sympy.Basic) -> str:  # noqa: N802
        return f"max({self.stringify(expr.args, ', ')})"

    def _print_Or(self, expr: sympy.Basic) -> str:  # noqa: N802
        return " or ".join(sorted(f"({self._print(each)})" for each in expr.args))

    def _print_And(self, expr: sympy.Basic) -> str:  # noqa: N802
        return " and ".join(sorted(f"({self._print(each)})" for each in expr.args))

    def _print_Not(self, expr: sympy.Basic) -> str:  # noqa: N802
        return f"not ({self._print(expr.args[0])})"

    def _print_Relational(self, expr: sympy.Basic) -> str:  # noqa: N802
        sign = {"Equality": "==", "Unequality": "!="}.get(type(expr).__name__, getattr(expr, "rel_op", "?"))
        return f"{self._print(expr.args[0])} {sign} {self._print(expr.args[1])}"

    _print_Equality = _print_Unequality = _print_Relational  # noqa: N815
