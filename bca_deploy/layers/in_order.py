"""Further legitimate evaluations of the reference: the same module with every product summed one term after another.

Floating-point addition does not associate, so one formula has many right answers. PyTorch's libraries add a dot product in
blocks, onnxruntime and a plain loop one term after another; which comes nearer to the truth depends on the processor and the
shape. Parity holds a model against the worst of PyTorch eager and these (see parity/rule.py).
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# So many sums are built side by side: they stay in a processor's cache while their terms are added.
_BLOCK = 2**16


class InOrder(TorchFunctionMode):
    """While this is on, linear layers, 1x1 convolutions and einsums of two operands add their terms one after another.

    Sums are float32 whatever comes in and are rounded to its dtype once, at the end, as matrix units do it.

    Args:
        order: 0 adds the terms as they stand, any other number shuffles them its own way.
    """

    def __init__(self, order: int = 0) -> None:
        super().__init__()
        self.order = order

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace what sums products; everything else runs as it is."""
        replaced: dict[Callable[..., Any], Callable[..., Any]] = {
            functional.linear: self._linear,
            torch.conv2d: self._conv2d,
            torch.einsum: self._any_einsum,
        }
        return replaced.get(func, func)(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = self._einsum("rk,ck->rc", x.reshape(-1, x.shape[-1]), weight, bias)
        return product.reshape(*x.shape[:-1], -1)

    def _conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Mix the channels, as the layer's talking heads do; any other convolution is a model's own, and runs as it is."""
        stride, padding = (*args, 1, 0)[:2] if len(args) != 1 else (args[0], 0)
        plain = stride in (1, (1, 1)) and padding in (0, (0, 0)) and not kwargs
        if not plain or weight.shape[2:] != (1, 1) or x.ndim != 4 or x.shape[1] != weight.shape[1]:
            return torch.conv2d(x, weight, bias, *args, **kwargs)
        return self._einsum("bkhw,ck->bhwc", x, weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)

    def _any_einsum(self, equation: str, *operands: Tensor) -> Tensor:
        """Sum in order what has two operands and one axis to sum over, as the layer's have; others run as they are."""
        match = re.fullmatch(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]*)", equation.replace(" ", ""))
        if not match or len(operands) != 2 or len(set(match[1]) | set(match[2])) != len(set(match[3])) + 1:
            return torch.einsum(equation, *operands)
        summed = set(match[1]) - set(match[3])
        if len(summed) != 1 or not summed <= set(match[2]) or any(len(set(axes)) < len(axes) for axes in match.groups()):
            return torch.einsum(equation, *operands)
        return self._einsum(equation, *operands)

    def _einsum(self, equation: str, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``torch.einsum(equation, a, b) + bias``, the one axis that the result lacks summed in order."""
        operands, result = equation.replace(" ", "").split("->")
        first, second = operands.split(",")
        (summed,) = set(first) - set(result)
        terms, factors = _aligned(a, first, summed + result), _aligned(b, second, summed + result)
        if self.order:
            shuffled = torch.randperm(len(terms), generator=torch.Generator().manual_seed(self.order))
            terms, factors = terms[shuffled], factors[shuffled]
        wide = _sums(terms, factors)
        return (wide if bias is None else wide + bias.float()).to(a.dtype)


def _aligned(t: Tensor, axes: str, wanted: str) -> Tensor:
    """Return ``t`` in float32 with its axes in the wanted order, of size 1 where it has none."""
    t = t.float().permute([axes.index(axis) for axis in wanted if axis in axes]).contiguous()
    return t[tuple(slice(None) if axis in axes else None for axis in wanted)]


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum over the first axis of ``a * b``, which broadcast, one term after another."""
    shape = [max(sizes) for sizes in zip(a.shape[1:], b.shape[1:], strict=True)]
    if math.prod(shape) > _BLOCK and max(shape) > 1:
        axis = next(i for i, size in enumerate(shape) if size > 1)
        halves = zip(_halves(a, axis + 1), _halves(b, axis + 1), strict=True)
        return torch.cat([_sums(*half) for half in halves], axis)
    total = a.new_zeros(shape)
    for terms, factors in zip(a, b, strict=True):
        total.addcmul_(terms, factors)
    return total


def _halves(t: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    if t.shape[axis] == 1:
        return t, t
    middle = t.shape[axis] // 2
    return t.narrow(axis, 0, middle), t.narrow(axis, middle, t.shape[axis] - middle)
