"""Inputs for a whole model: like its samples in what they hold, of any sizes, with masks of every kind."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bca_deploy.errors import InputError, nearest
from bca_deploy.parity.cases import round_to
from bca_deploy.signature import Tensor
from bca_deploy.spec import Precision
from bca_deploy.whole.samples import Sample

Arrays = dict[str, NDArray[Any]]
Pattern = Literal["all live", "padded", "scattered", "dead rows"]

PATTERNS: tuple[Pattern, ...] = get_args(Pattern)


@dataclass(frozen=True)
class Draws:
    """What each input may hold.

    Attributes:
        tensors: the inputs.
        masks: bool inputs, and integer ones of 0 and 1; every pattern is drawn for them.
        integers: of each other integer input, the least and the largest value.
        floats: of each floating-point input, mean and standard deviation.
    """

    tensors: tuple[Tensor, ...]
    masks: tuple[str, ...]
    integers: Mapping[str, tuple[int, int]]
    floats: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def inputs(self, sizes: Mapping[str, int], pattern: Pattern, seed: int, precision: Precision) -> Arrays:
        """Return inputs of these sizes: floats as float32 that the precision represents, and the same every time."""
        key = f"{pattern} {sorted(sizes.items())}"
        rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
        return {t.name: self._one(rng, t, t.shape(sizes), pattern, precision) for t in self.tensors}

    def _one(
        self, rng: np.random.Generator, tensor: Tensor, shape: tuple[int, ...], pattern: Pattern, precision: Precision
    ) -> NDArray[Any]:
        if tensor.name in self.masks:
            found = _MASKS[pattern](rng, shape, self.masks.index(tensor.name))
            return found.astype(tensor.dtype)
        if tensor.is_float:
            mean, spread = self.floats.get(tensor.name, (0.0, 1.0))
            return round_to(rng.normal(mean, spread, shape), precision)
        low, high = self.integers[tensor.name]
        return rng.integers(low, high + 1, shape).astype(tensor.dtype)


def draws_of(
    samples: Sequence[Sample], tensors: Sequence[Tensor], masks: Mapping[str, str], ranges: Mapping[str, tuple[int, int]]
) -> Draws:
    """Return how to draw inputs like the samples.

    Args:
        samples: of the model, by name.
        tensors: its inputs.
        masks: integer inputs that are masks, each with the dimension it masks.
        ranges: of integer inputs, the least and the largest value.

    Raises:
        InputError: a mask or a range of what is no integer input, or that cannot be; or an integer input of which the samples
            do not tell what it is: with one value, or 0 and 1 alone, it could be a mask.
    """
    dtypes = {tensor.name: tensor.dtype for tensor in tensors}
    for what, names in (("mask", masks), ("range", ranges)):
        for name in names:
            if not dtypes.get(name, "").startswith("int"):
                known = [n for n, dtype in dtypes.items() if dtype.startswith("int")]
                raise InputError(
                    f"{what} {name!r}: no such integer input{nearest(name, known)}; there are {', '.join(known) or 'none'}"
                )
    _check_said(tensors, masks, ranges)
    integers = {n: ranges.get(n) or _range(n, samples) for n, d in dtypes.items() if d.startswith("int") and n not in masks}
    found = tuple(name for name, dtype in dtypes.items() if dtype == "bool" or name in masks)
    floats = {tensor.name: _moments(tensor.name, samples) for tensor in tensors if tensor.is_float}
    return Draws(tuple(tensors), found, integers, floats)


def _check_said(tensors: Sequence[Tensor], masks: Mapping[str, str], ranges: Mapping[str, tuple[int, int]]) -> None:
    for tensor in tensors:
        name, dims = tensor.name, [axis for axis in tensor.axes if isinstance(axis, str)]
        if name in masks and masks[name] not in dims:
            has = ", ".join(dims) or "none"
            raise InputError(f"mask {name!r}: it has no dimension {masks[name]!r}{nearest(masks[name], dims)}; it has {has}")
        if name in masks and name in ranges:
            raise InputError(f"{name} is both a mask and numbers of a range; say one of them")
        if name in ranges and ranges[name][0] > ranges[name][1]:
            low, high = ranges[name]
            raise InputError(f"range {name!r}: {low} to {high}; give the least value first")


def _range(name: str, samples: Sequence[Sample]) -> tuple[int, int]:
    values = {int(value) for sample in samples for value in np.unique(sample[name].numpy())}
    if len(values) == 1 or values <= {0, 1}:
        raise InputError(
            f"integer input {name} holds only {', '.join(map(str, sorted(values)))} in the samples: say what it is, a mask "
            f"(--mask {name}:DIM, where DIM is the dimension it masks) or numbers of a range (--range {name}=0:100)"
        )
    return min(values), max(values)


def _moments(name: str, samples: Sequence[Sample]) -> tuple[float, float]:
    """Return mean and standard deviation over all samples; a constant input varies by as much as it is large."""
    values = np.concatenate([sample[name].numpy().astype(np.float64).ravel() for sample in samples])
    mean, spread = float(values.mean()), float(values.std())
    return mean, spread or abs(mean) or 1.0


def _all_live(rng: np.random.Generator, shape: tuple[int, ...], index: int) -> NDArray[Any]:
    return np.ones(shape, dtype=bool)


def _padded(rng: np.random.Generator, shape: tuple[int, ...], index: int) -> NDArray[Any]:
    if not shape:
        return np.array(rng.random() < 0.5)
    lengths = rng.integers(1, shape[-1] + 1, size=shape[:-1])
    return np.asarray(np.arange(shape[-1]) < lengths[..., None])


def _scattered(rng: np.random.Generator, shape: tuple[int, ...], index: int) -> NDArray[Any]:
    return np.asarray(rng.random(shape) < 0.6)


def _dead_rows(rng: np.random.Generator, shape: tuple[int, ...], index: int) -> NDArray[Any]:
    """Entry 0 is dead in the first mask, entry 1 in the second and so on; entry 2 in all of them, the rest padded."""
    mask = _padded(rng, shape, index)
    if mask.ndim > 1:
        mask[index % 2 :: 4] = False
        mask[2::4] = False
    return mask if mask.ndim > 1 else np.zeros(shape, dtype=bool)


_MASKS: dict[Pattern, Callable[[np.random.Generator, tuple[int, ...], int], NDArray[Any]]] = {
    "all live": _all_live,
    "padded": _padded,
    "scattered": _scattered,
    "dead rows": _dead_rows,
}
