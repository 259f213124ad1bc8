"""A module whose calls a program has kept: it is called by name, with what it was called with, at any size."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx, nn

from bca_deploy.errors import BcaError, InputError, first_line
from bca_deploy.layers.checkpoint import from_module
from bca_deploy.programs.pieces import Piece

# What arguments by position are called, as a program does not say it; the seed's order.
_ORDER = ("x", "context", "mask", "context_mask", "return_attn", "rel_pos_bias")
# Lengths to run it with where the program leaves them open.
_LENGTHS = (7, 5)
# What a length may have been before a model made it shorter.
_LARGEST = 4096
# In float64: what calls that compute the same differ by is rounding.
_SAME = 1e-9

_Shape = tuple[sympy.Basic, ...]


@dataclass(frozen=True)
class Call:
    """One call of a module in a program.

    Attributes:
        piece: what the call runs.
        order: what each placeholder stands for: an argument by its name, or empty for a value from outside of the module.
        shapes: of the tensors that it was given, by name.
        constants: what else it was given, by name.
        outside: the shapes of the values from outside; a program takes sizes from wherever it first saw them.
    """

    piece: Piece
    order: tuple[str, ...]
    shapes: Mapping[str, _Shape]
    constants: Mapping[str, Any]
    outside: tuple[_Shape | None, ...]

    def run(self, given: Mapping[str, Any], outside: Sequence[Any] | None = None) -> Any:
        """Run it with these tensors by name; masks and a bias that are not given change nothing."""
        tensors = self._completed(given)
        values = iter(self._made_up(tensors) if outside is None else outside)
        everything = {**self.constants, **tensors}
        return self.piece.run([everything[name] if name else next(values) for name in self.order])

    def _completed(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        found = {name: given[name] for name in self.shapes if given.get(name) is not None}
        sides = dict(list(found.items())[:2])
        sizes = {expr: n for name, t in sides.items() for expr, n in zip(self.shapes[name], t.shape, strict=True)}
        like = next(iter(sides.values()))
        for name in self.shapes.keys() - found.keys():
            shape = [sizes.get(expr, expr) for expr in self.shapes[name]]
            made = like.new_zeros([int(size) for size in shape])
            found[name] = made == 0 if len(shape) == 2 else made  # a mask, or a bias
        return found

    def _sides(self) -> tuple[_Shape, _Shape]:
        one, other = list(self.shapes.values())[:2]
        return one, other

    def obstacle(self) -> str:
        """Return why the call says too little of its module, in words that follow its name; empty where it does not."""
        if len(self.shapes) < 2 or any(len(shape) != 3 for shape in self._sides()):
            return "is not called with two sequences"
        batch = self._sides()[0][0]
        if isinstance(batch, sympy.Integer) and batch != 1:
            return f"was exported for a batch of exactly {batch}, so that it cannot be tried; export it with a dynamic batch"
        whole = {(batch, side[1]) for side in self._sides()}
        odd = [name for name, shape in self.shapes.items() if len(shape) == 2 and shape not in whole]
        return f"was exported with a {odd[0]} that is not of its sequence's size, and holds for no other" if odd else ""

    def lengths(self) -> tuple[int, int]:
        """Return lengths of both sequences that it can be run with."""
        one, other = (side[1] for side in self._sides())
        free = (_LENGTHS[0], _LENGTHS[0] if other == one else _LENGTHS[1])
        found = [int(size) if isinstance(size, sympy.Integer) else n for size, n in zip((one, other), free, strict=True)]
        return found[0], found[1]

    def _made_up(self, tensors: Mapping[str, Tensor]) -> list[Any]:
        """Return what has the sizes of the values from outside, and no number in it."""
        sizes = _solved(self.shapes, tensors)
        like = next(iter(tensors.values()))
        made = []
        for shape in self.outside:
            if shape is None:
                raise InputError("the program gives it values from outside of its arguments")
            made.append(like.new_full((), torch.nan).expand([int(size.xreplace(sizes)) for size in shape]))
        return made


def _solved(shapes: Mapping[str, _Shape], tensors: Mapping[str, Tensor]) -> dict[sympy.Basic, sympy.Basic]:
    """Return for torch's symbols sizes that give tensors these shapes: of several in one, all but the last are 1."""
    pairs = [pair for name, t in tensors.items() for pair in zip(shapes[name], map(sympy.Integer, t.shape), strict=False)]
    found = {expr: size for expr, size in pairs if isinstance(expr, sympy.Symbol)}
    for expr, size in pairs:
        *others, last = sorted(expr.free_symbols - found.keys(), key=str) or [None]
        if last is not None:
            found |= dict.fromkeys(others, sympy.Integer(1))
            found[last] = _root(expr.xreplace(found), last, size)
    return found


def _root(expr: sympy.Basic, of: sympy.Symbol, size: sympy.Integer) -> sympy.Integer:
    tried = map(sympy.Integer, range(1, _LARGEST))
    root = next((n for n in tried if expr.xreplace({of: n}) == size), None)
    if root is None:
        raise InputError(f"the program never gives it a length of {size}")
    return root


class Kept(Piece):
    """A module whose calls are kept.

    Args:
        calls: in order; the first one's weights are the module's.
        source: the module.
        own: the precision that the program was exported in.
    """

    def __init__(self, calls: Sequence[Call], source: nn.Module, own: torch.dtype) -> None:
        super().__init__(fx.Graph(), source, own)
        self.calls = tuple(calls)
        for number, call in enumerate(calls):
            self.add_module(f"@{number}", call.piece)
        self.obstacle = next(filter(None, (call.obstacle() for call in calls)), "")
        if not self.obstacle:
            self._count_heads()

    def _count_heads(self) -> None:
        try:
            heads = _heads(self)
        except Exception as error:  # a graph raises what it likes
            self.obstacle = f"cannot be run outside of the program: {first_line(error)}"
        else:
            if heads is not None:
                self.heads = heads

    @property
    def lengths(self) -> tuple[int, int]:
        """Lengths of both sequences that the program can run it with."""
        return self.calls[0].lengths()

    def call(self, outside: tuple[int, Sequence[Any]] | None = None, **given: Any) -> Any:
        """Run the call of this number with the values that the program gives it, or all calls and see that they agree."""
        if outside is not None:
            return self._with_unused(self.calls[outside[0]].run(given, outside[1]), given)
        named = {name for name, value in given.items() if isinstance(value, Tensor)}
        if not named <= self.calls[0].shapes.keys():
            raise InputError(f"the program never gives it {', '.join(sorted(named))} together")
        first = self.alone(given)
        found = self._with_unused(first, given)
        return found if given.get("return_attn") else found[:2]

    def alone(self, given: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
        """Run it outside of the program; what the program does not use of its outputs is None."""
        first, *others = (self._whole(each, given) for each in self.calls)
        if not all(_alike(first, other) for other in others):
            raise InputError("the program's calls of it do not compute the same")
        return first

    def _whole(self, call: Call, given: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
        """Run a call of any batch; a program that fixes it at 1 gets entry by entry."""
        batch = next(iter(call.shapes.values()))[0]
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        if not isinstance(batch, sympy.Integer):
            return tuple(call.run(tensors))
        entries = [
            {name: t if name == "rel_pos_bias" else t[at : at + 1] for name, t in tensors.items()}
            for at in range(next(iter(tensors.values())).shape[0])
        ]
        outputs = zip(*(call.run(entry) for entry in entries), strict=True)
        return tuple(None if None in each else torch.cat(each) for each in map(list, outputs))

    def _with_unused(self, outputs: Sequence[Tensor | None], given: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return outputs that the program has left out, as nothing uses them, as the layer with its weights gives them."""
        if all(output is not None for output in outputs) or torch.compiler.is_exporting():
            return tuple(outputs)
        sequences, others = list(self.calls[0].shapes)[:2], {name: t for name, t in given.items() if t is not None}
        x, context = (others.pop(name) for name in sequences)
        layer = from_module(self).module(x.dtype)
        made = layer(x, context, **others)
        return tuple(one if one is not None else other for one, other in zip(outputs, made, strict=False))


def parameters_of(calls: Sequence[Call]) -> dict[str, Any]:
    """Return what a kept module is called with, and ``outside`` for the values that are no arguments of its own."""
    names = dict.fromkeys(name for call in calls for name in call.shapes)
    found: dict[str, Any] = {name: inspect.Parameter.empty if at < 2 else None for at, name in enumerate(names)}
    if any(call.constants.get("return_attn") is True for call in calls):
        found["return_attn"] = False
    return {**found, "outside": None}


def named(positions: int, keywords: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """Return the names of a call's arguments: those by position, then the keywords."""
    known = list(names or _ORDER)
    return [*(known[at] if at < len(known) else f"argument_{at}" for at in range(positions)), *keywords]


def _heads(kept: Kept) -> int | None:
    """Return the number of heads with which the weights compute what the module does; None where the weights say it.

    Where none does, the one that is nearest: what else is wrong is the proof's to say.
    """
    state = kept.state_dict()
    place = "layers.0.0." if "layers.0.0.to_qk.weight" in state else ""
    if f"{place}to_qk.weight" not in state or f"{place}talking_heads.weight" in state:
        return None
    inner = state[f"{place}to_qk.weight"].shape[0]
    return min((n for n in range(1, inner + 1) if inner % n == 0), key=_Trial(kept))


class _Trial:
    """How far a module is from the layer with its weights and a number of heads."""

    def __init__(self, kept: Kept) -> None:
        self._kept, generator = kept, torch.Generator().manual_seed(0)
        sides = dict(zip(kept.calls[0].shapes.items(), kept.lengths, strict=False))
        drawn = {"generator": generator, "dtype": torch.float64}
        given = {name: torch.randn(2, length, int(shape[2]), **drawn) for (name, shape), length in sides.items()}  # type: ignore[call-overload]
        self._given = tuple(given.values())
        with torch.no_grad():
            self._true = copy.deepcopy(kept).double().alone(given)

    def __call__(self, heads: int) -> float:
        try:
            tried = from_module(self._kept, heads).module(torch.float64)
        except BcaError:
            return torch.inf
        with torch.no_grad():
            got = tried(*self._given)
        pairs = [(a, b) for a, b in zip(got[:2], self._true, strict=False) if b is not None]
        return max((float((a - b).abs().max() / b.abs().max()) for a, b in pairs), default=torch.inf)


def _alike(first: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    """Whether two calls compute the same, as far as the program uses both."""
    both = [(a, b) for a, b in zip(first, other, strict=False) if a is not None and b is not None]
    return len(first) == len(other) and all(torch.allclose(a, b, rtol=_SAME, atol=_SAME) for a, b in both)
