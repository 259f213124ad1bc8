"""What a model's inputs mean, found out by running it: the batch, the masks that hide padding, what may be left out."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from bca_deploy.errors import InputError
from bca_deploy.signature import Dims, Signature, Tensor
from bca_deploy.whole.draws import Draws, Pattern
from bca_deploy.whole_parity.yardstick import Runs

Arrays = dict[str, NDArray[Any]]

# Of the largest value. Both runs are float64: what is left is rounding.
_SAME = 1e-9
_ENTRIES = 3
# Added to each length that is padded.
_PADDING = 3


@dataclass(frozen=True)
class Laboratory:
    """A model to be tried out.

    Attributes:
        model: whose forward's defaults count.
        evaluator: of float64.
        draws: its inputs.
    """

    model: nn.Module
    evaluator: Runs
    draws: Draws

    def run(self, inputs: Arrays) -> Arrays:
        """Return the model's outputs."""
        return self.evaluator.run(inputs).outputs

    def refine(self, signature: Signature) -> Signature:
        """Return the signature with batch, masks and fills, each only where the model really behaves so."""
        signature = replace(signature, batch=self._batch(signature))
        signature = replace(signature, masks=self._masks(signature))
        return replace(signature, inputs=tuple(self._filled(tensor, signature) for tensor in signature.inputs))

    def broken(self, signature: Signature) -> list[str]:
        """Return what a signature says and the model, with other weights than it was found out with, no longer does."""
        batch = [] if signature.batch is None or self._apart(signature.batch, signature) else [signature.batch]
        found = [f"entries of {dim} know of each other" for dim in batch]
        hidden = self._masks(signature)
        shown = {dim: mask for dim, mask in signature.masks.items() if dim not in hidden}
        return [*found, *(f"{mask} no longer hides the padding of {dim}" for dim, mask in shown.items())]

    def _batch(self, signature: Signature) -> str | None:
        """Return the dimension whose entries do not know of each other: each alone gives the same as in the batch."""
        first = [t.axes[0] for t in signature.inputs if t.axes and isinstance(t.axes[0], str)]
        for dim in dict.fromkeys(str(axis) for axis in first):
            later = [t for t in (*signature.inputs, *signature.outputs) if any(dim in signature.dims_of(a) for a in t.axes[1:])]
            if not later and self._apart(dim, signature):
                return dim
        return None

    def _apart(self, dim: str, signature: Signature) -> bool:
        entries = signature.dims[dim].clip(_ENTRIES)
        if signature.dims[dim].min > 1 or entries == 1 or not any(dim in t.axes for t in signature.outputs):
            return False
        together = self.draws.inputs(_small(signature.dims) | {dim: entries}, "padded", 5, "fp32")
        whole = self.run(together)
        apart = {t.name for t in self.draws.tensors if dim in t.axes}
        alone = [self.run({n: a[i : i + 1] if n in apart else a for n, a in together.items()}) for i in range(entries)]

        def joined(tensor: Tensor) -> NDArray[Any]:
            first = alone[0][tensor.name]
            return np.concatenate([one[tensor.name] for one in alone]) if dim in tensor.axes else first

        return all(_alike(whole[tensor.name], joined(tensor)) for tensor in signature.outputs)

    def _masks(self, signature: Signature) -> dict[str, str]:
        """Return of each dimension the mask that hides its padding: with padding, the model gives the same where it is live."""
        axes = (signature.batch,) if signature.batch else ()
        found: dict[str, str] = {}
        for tensor in signature.inputs:
            *before, dim = tensor.axes or (None,)
            if tensor.name in self.draws.masks and tuple(before) == axes and isinstance(dim, str):
                found.setdefault(dim, tensor.name)
        return {dim: mask for dim, mask in found.items() if self._hides(dim, found, signature)}

    def _hides(self, dim: str, masks: Mapping[str, str], signature: Signature) -> bool:
        sizes = _small(signature.dims)
        longer = signature.dims[dim].clip(sizes[dim] + _PADDING)
        patterns: tuple[Pattern, ...] = ("all live", "padded")
        return longer > sizes[dim] and all(self._same(pattern, dim, longer, masks, signature) for pattern in patterns)

    def _same(self, pattern: Pattern, dim: str, longer: int, masks: Mapping[str, str], signature: Signature) -> bool:
        inputs = self.draws.inputs(_small(signature.dims), pattern, 3, "fp32")
        try:
            padded = self.run({t.name: _padded(inputs[t.name], t, dim, longer) for t in self.draws.tensors})
        except InputError:  # the longer ones are not to its taste
            return False
        live = {other: inputs[name].astype(bool) for other, name in masks.items()}
        short = self.run(inputs)
        return all(_same_where_live(t, short[t.name], padded[t.name], live) for t in signature.outputs)

    def _filled(self, tensor: Tensor, signature: Signature) -> Tensor:
        """Return a mask with the fill that leaving it out means: all live, where the model says the same without it."""
        parameters = inspect.signature(self.model.forward).parameters
        optional = tensor.name in parameters and parameters[tensor.name].default is None
        elsewhere = {axis for t in signature.inputs if t.fill is None and t.name != tensor.name for axis in t.axes}
        if tensor.name not in self.draws.masks or not optional or not elsewhere.issuperset(tensor.axes):
            return tensor
        inputs = self.draws.inputs(_small(signature.dims), "padded", 6, "fp32")
        inputs[tensor.name] = np.ones_like(inputs[tensor.name])
        full = self.run(inputs)
        try:
            without = self.run({name: array for name, array in inputs.items() if name != tensor.name})
        except InputError:
            return tensor
        same = set(full) == set(without) and all(_alike(full[name], without[name]) for name in full)
        return replace(tensor, fill=True if tensor.dtype == "bool" else 1) if same else tensor


def _small(dims: Dims) -> dict[str, int]:
    """Return sizes of which no two are alike, where the ranges allow it."""
    return {name: dims[name].clip(size) for name, size in zip(dims, (2, 7, 5, 8, 9, 11, 13, 6, 10, 12), strict=False)}


def _padded(array: NDArray[Any], tensor: Tensor, dim: str, size: int) -> NDArray[Any]:
    widths = [(0, size - n if axis == dim else 0) for axis, n in zip(tensor.axes, array.shape, strict=True)]
    return np.pad(array, widths)


def _same_where_live(tensor: Tensor, short: NDArray[Any], padded: NDArray[Any], live: Mapping[str, NDArray[Any]]) -> bool:
    """Compare what the shorter call gave: at positions that are live in every entry; where there are none, at the first."""
    if padded.ndim != short.ndim:
        return False
    cut = padded[tuple(slice(size) for size in short.shape)]
    for axis, dim in enumerate(tensor.axes):
        if dim in live:
            everywhere = live[str(dim)].reshape(-1, live[str(dim)].shape[-1]).all(0)
            places = np.flatnonzero(everywhere) if everywhere.any() else np.array([0])
            short, cut = np.take(short, places, axis), np.take(cut, places, axis)
    return _alike(short, cut)


def _alike(one: NDArray[Any], other: NDArray[Any]) -> bool:
    if one.shape != other.shape:
        return False
    wide, reference = one.astype(np.float64), other.astype(np.float64)
    scale = float(np.abs(reference[np.isfinite(reference)]).max(initial=0.0)) or 1.0
    return bool(np.allclose(wide, reference, rtol=0, atol=_SAME * scale, equal_nan=True))
