"""What graphs are held against where the model's code is not there: its trace, run operation by operation.

Truth is the float32 trace in float64, constants as the trace has them; at export it is held against the model itself. What
stands beside it is the trace at the graphs' own precision, in place of PyTorch.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from bca_deploy.errors import InputError, first_line
from bca_deploy.parity import strict_evaluator
from bca_deploy.parity.cases import NUMPY_DTYPES
from bca_deploy.spec import Precision
from bca_deploy.tracing.hollow import feeds, own_inputs
from bca_deploy.whole_parity.evaluate import Evaluation, LayerCall
from bca_deploy.whole_parity.yardstick import Yardstick

Arrays = dict[str, NDArray[Any]]

# What a masked logit is below; far above every one that is not.
_FILL = -1e30
# As for a layer: logits this far below their row's maximum weigh nothing.
_WEIGHTLESS = 50.0
_HALVES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


class TraceEvaluator:
    """A trace at one precision, or in float64.

    Args:
        trace: hollow, from :func:`bca_deploy.tracing.hollow.hollow`.
        weights: what its weights are.
        precision: what it was traced in; None for float64, whatever it was traced in.
        outputs: how many outputs are the model's own; layers' come after.
    """

    def __init__(
        self, trace: onnx.ModelProto, weights: Mapping[str, torch.Tensor], precision: Precision | None, outputs: int
    ) -> None:
        self._trace = trace if precision else _doubled(trace)
        self._precision, self._outputs = precision, outputs
        self._weights = {name: self._at(name, array) for name, array in feeds(trace, dict(weights)).items()}
        self._names = [output.name for output in trace.graph.output]
        self._taken = set(own_inputs(trace))
        self._logits = [0.0]
        self._evaluator = cache(self._made)

    def run(self, inputs: Mapping[str, NDArray[Any]], order: int | None = None) -> Evaluation:
        """Run it; ``order`` is that in which products are summed, None for as numpy does.

        Raises:
            InputError: an operator refuses these inputs.
        """
        self._logits[:] = [0.0]
        given = {name: self._at(name, array) for name, array in inputs.items() if name in self._taken}
        try:
            with np.errstate(all="ignore"):
                found = self._evaluator(order).run(self._names, {**self._weights, **given})
        except Exception as error:  # an operator raises what it likes
            raise InputError(f"the trace cannot be evaluated: {first_line(error)}; give the model's code") from error
        arrays = [np.asarray(a).astype(np.float64) if _is_float(a) else np.asarray(a) for a in found]
        own = dict(zip(self._names[: self._outputs], arrays, strict=False))
        return Evaluation(own, tuple(_calls(dict(zip(self._names, arrays, strict=True)), self._names[self._outputs :])))

    def run_as_usual(self, inputs: Mapping[str, NDArray[Any]]) -> Evaluation:
        """Run it: a trace has one way."""
        return self.run(inputs)

    def run_with_bias_apart(self, inputs: Mapping[str, NDArray[Any]]) -> Evaluation:
        """Run it: most of its biases are added to rounded products as they are."""
        return self.run(inputs)

    def largest_logit(self) -> float:
        """Return the largest |logit| that carried weight in the latest run."""
        return max(self._logits)

    def _at(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Return an array in the type that the trace has it in."""
        if not _is_float(array):
            return array
        if self._precision is None:
            return array.astype(np.float64)
        kind = next(v.type.tensor_type.elem_type for v in self._trace.graph.input if v.name == name)
        return array.astype(onnx.helper.tensor_dtype_to_np_dtype(kind))

    def _made(self, order: int | None) -> ReferenceEvaluator:
        ops = [op for op in strict_evaluator.OPERATORS if op.__name__ != "Softmax"]
        ops = ops if order is None else [op for op in ops if op.__name__ != "MatMul"] + [_in_order(order)]
        return ReferenceEvaluator(self._trace, new_ops=[*ops, _watching(self._logits)])


def _is_float(array: Any) -> bool:
    return np.asarray(array).dtype.kind == "f" or np.asarray(array).dtype in (NUMPY_DTYPES["bf16"],)


def _calls(arrays: Arrays, taps: Sequence[str]) -> list[LayerCall]:
    """Return the layers' calls, of which a trace shows the outputs alone."""
    found: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    for tap in taps:
        path, number, output = tap.rsplit("/", 2)
        found.setdefault((path, int(number)), {})[output] = torch.from_numpy(np.asarray(arrays[tap]))
    return [LayerCall(path, number, {}, outputs) for (path, number), outputs in found.items()]


def _watching(seen: list[float]) -> type[OpRun]:
    class Softmax(strict_evaluator.Softmax):
        def _run(self, x: NDArray[Any], axis: int = -1) -> tuple[NDArray[Any]]:
            wide = x.astype(np.float64)
            counts = (wide > wide.max(axis=axis, keepdims=True, initial=-np.inf) - _WEIGHTLESS) & (wide > _FILL)
            seen.append(float(np.abs(wide[counts]).max(initial=0.0)))
            return super()._run(x, axis)

    return Softmax


def _in_order(order: int) -> type[OpRun]:
    class MatMul(OpRun):
        def _run(self, a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[Any]]:
            """Sum the terms one after another: as they stand, or shuffled."""
            terms = a.shape[-1]
            places = np.arange(terms) if order == 0 else np.random.default_rng(order).permutation(terms)
            if a.ndim < 2 or b.ndim < 2:
                return (np.matmul(a, b),)
            wide = np.result_type(a.dtype, np.float32)
            total = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), wide)
            for place in places:
                total += a[..., place, None].astype(wide) * b[..., place, None, :].astype(wide)
            return (total.astype(a.dtype),)

    return MatMul


def _doubled(trace: onnx.ModelProto) -> onnx.ModelProto:
    """Return the trace with float64 in place of every smaller float."""
    found = onnx.ModelProto()
    found.CopyFrom(trace)
    graphs = [found.graph]
    while graphs:
        graph = graphs.pop()
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in _HALVES:
                value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
        for tensor in graph.initializer:
            _double(tensor)
        for node in graph.node:
            graphs += [inner for a in node.attribute for inner in (a.g, *a.graphs) if inner.node]
            _double_node(node)
    return found


def _double_node(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name in {"to", "dtype"} and attribute.i in _HALVES:
            attribute.i = onnx.TensorProto.DOUBLE
        for tensor in (attribute.t, *attribute.tensors):
            _double(tensor)
        if node.op_type == "Constant" and attribute.name in {"value_float", "value_floats"}:
            values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            attribute.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(np.array(values, np.float64))))


def _double(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _HALVES:
        wide = onnx.numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))


class TraceYardstick(Yardstick):
    """What graphs of one precision are held against without the model's code.

    Args:
        exact: in float64, the weights rounded to the precision.
        own: at the precision.
        unrounded: in float64, the weights as they are.
        precision: of the graphs.
        widest: the length of the longest product.
    """

    def __init__(
        self, exact: TraceEvaluator, own: TraceEvaluator, unrounded: TraceEvaluator, precision: Precision, widest: int
    ) -> None:
        self.precision = precision
        self._exact, self._rounded, self._trace = exact, own, exact
        self._unrounded = unrounded if precision != "fp32" else None
        self._changes, self._widest = [], widest

    def _live(self, truth: Evaluation) -> Arrays:
        """Return that every row is live: a trace does not say which are not."""
        return {name: np.ones(a.shape, dtype=bool) for name, a in truth.with_taps().items()}

    def _logit(self, truth: Evaluation) -> float:
        return self._trace.largest_logit()


def why_not(evaluator: TraceEvaluator, yardstick: Yardstick, inputs: Arrays) -> str | None:
    """Return why a trace in float64 cannot stand for its model in float64; None where it can.

    Its constants are float32: what rounding one of them does is what the slack of the per-case rule allows.

    Args:
        evaluator: of float64.
        yardstick: of the model, in float32.
        inputs: to try.
    """
    truth = yardstick.truth(inputs)
    slack = yardstick.slack(truth)
    try:
        found = evaluator.run(inputs).outputs
    except InputError as error:
        return first_line(error)
    differences = (_difference(name, found[name], true.astype(np.float64), slack) for name, true in truth.outputs.items())
    return next((each for each in differences if each is not None), None)


def _difference(name: str, found: NDArray[Any], true: NDArray[Any], slack: float) -> str | None:
    defined = np.isfinite(true)
    if found.shape != true.shape:
        return f"{name} has shape {list(found.shape)} in the trace, {list(true.shape)} in the model"
    worst = float(np.abs(found[defined].astype(np.float64) - true[defined]).max(initial=0.0))
    allowed = slack * float(np.abs(true[defined]).max(initial=0.0))
    return None if worst <= allowed else f"{name} is off by {worst:.3g} in the trace, run in float64; allowed {allowed:.3g}"
