"""Inputs to time a model with: a padded batch of any sizes, and the same every time."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.signature import Signature, Tensor

Array = NDArray[Any]


def padded_inputs(signature: Signature, sizes: Mapping[str, int], seen: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """Return seeded inputs: every row keeps three quarters of its positions or more; floats are normal numbers, in float32.

    Args:
        signature: of the model.
        sizes: of each named dimension.
        seen: of integer inputs that are no masks, values to draw from; without them they are what may be left out, or 0.
    """
    rng = np.random.default_rng(0)

    def one(tensor: Tensor) -> Array:
        shape = tensor.shape(sizes)
        if tensor.name in signature.masks.values():
            rows = rng.integers((3 * shape[-1] + 3) // 4, shape[-1] + 1, size=(*shape[:-1], 1))
            return np.asarray(np.arange(shape[-1]) < rows).astype(tensor.dtype)
        if tensor.is_float:
            return rng.standard_normal(shape).astype(np.float32)
        if seen and tensor.name in seen:
            return rng.choice(seen[tensor.name].ravel(), shape).astype(tensor.dtype)
        return np.full(shape, tensor.fill or 0, tensor.dtype)

    return {tensor.name: one(tensor) for tensor in signature.inputs}
