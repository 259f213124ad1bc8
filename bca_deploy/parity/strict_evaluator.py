"""A strict-dtype evaluator: every node's result is rounded to the dtype the graph declares, as on a GPU.

onnxruntime on CPU slips float32 casts into half-precision graphs and so hides overflow. This is onnx's reference evaluator
with the operators replaced that it gets wrong or slow in half precision. Each of them computes in float32 inside and rounds
once at the end: matrix units accumulate half-precision products in float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

Array = NDArray[Any]


def _wide(array: Array) -> Array:
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


class MatMul(OpRun):
    """Matrix product with float32 accumulation."""

    def _run(self, a: Array, b: Array) -> tuple[Array]:
        return (np.matmul(_wide(a), _wide(b)).astype(a.dtype),)


class Softmax(OpRun):
    """Softmax whose exponentials and sum are float32."""

    def _run(self, x: Array, axis: int = -1) -> tuple[Array]:
        wide = _wide(x)
        powers = np.exp(wide - wide.max(axis=axis, keepdims=True))
        return ((powers / powers.sum(axis=axis, keepdims=True)).astype(x.dtype),)


class Sigmoid(OpRun):
    """Sigmoid rounded once: onnx's own rounds at every step."""

    def _run(self, x: Array) -> tuple[Array]:
        return ((1 / (1 + np.exp(-_wide(x)))).astype(x.dtype),)


class ReduceSum(OpRun):
    """Sum with float32 accumulation; the total still has to fit the declared dtype."""

    def _run(self, x: Array, axes: Array | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> tuple[Array]:
        axis = None if axes is None else tuple(int(i) for i in axes)
        return (np.asarray(_wide(x).sum(axis=axis, keepdims=bool(keepdims))).astype(x.dtype),)


class LayerNormalization(OpRun):
    """LayerNormalization that honours ``stash_type``: 1 normalises in float32 whatever the input's dtype."""

    def _run(
        self, x: Array, scale: Array, bias: Array | None = None, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
    ) -> tuple[Array, Array, Array]:
        wide = x.astype(np.float32) if stash_type == 1 and x.dtype != np.float64 else x
        axes = tuple(range(axis % x.ndim, x.ndim))
        mean = wide.mean(axis=axes, keepdims=True)
        inverse = 1 / np.sqrt(np.square(wide - mean).mean(axis=axes, keepdims=True) + np.asarray(epsilon, wide.dtype))
        normal = ((wide - mean) * inverse).astype(x.dtype) * scale
        return (normal if bias is None else normal + bias).astype(x.dtype), mean, inverse


#: What it replaces of onnx's own.
OPERATORS: list[type[OpRun]] = [MatMul, Softmax, Sigmoid, ReduceSum, LayerNormalization]


def strict_runner(model: onnx.ModelProto) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """Return a function from inputs to outputs, both by name.

    Args:
        model: any model of ai.onnx operators; half and bfloat16 tensors are numpy's and ml_dtypes' types.
    """
    evaluator = ReferenceEvaluator(model, new_ops=OPERATORS)
    names = [output.name for output in model.graph.output]

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        # Dead rows overflow to -inf on purpose before they are replaced; parity judges the outputs.
        with np.errstate(all="ignore"):
            return dict(zip(names, evaluator.run(names, dict(inputs)), strict=True))

    return run
