"""What overflows or drifts in half precision is computed in float32: a Cast in, a Cast out.

Requires: types on values, functions inlined. Ensures: inputs, outputs and weights keep names and types; between two widened
nodes there is no Cast; nothing between an attention's products and its softmax is widened, since compilers fuse those only as
they are.

Widened are sums and norms. Forward from them: what is computed of sums alone (an epsilon, a root), where that meets what was
summed over, and the affine part behind. Backward from them: what a sum alone reads and what may not fit half precision where
the sum does (squares, powers, exponentials).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

# With their unit roundoffs.
_HALF = {ir.DataType.FLOAT16: 2.0**-11, ir.DataType.BFLOAT16: 2.0**-8}
_FLOATS = (*_HALF, ir.DataType.FLOAT)

_SUMS = {
    *("ReduceMean", "ReduceSum", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"),
    *("GlobalAveragePool", "GlobalLpPool"),
}
_EXTREMES = {"ReduceMax", "ReduceMin"}  # exact in half precision; what they are taken from is not
# BatchNormalization is not among them: it sums nothing, and compilers fold it into the Conv before it.
_NORMS = {
    *("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "LpNormalization"),
    *("MeanVarianceNormalization", "LRN", "CumSum", "AveragePool", "LpPool", "Softplus", "Mish", "Log"),
}
_ARITHMETIC = {"Add", "Sub", "Mul", "Div"}
_POINTWISE = _ARITHMETIC | {
    *("Pow", "Sqrt", "Reciprocal", "Abs", "Neg", "Exp", "Clip", "Max", "Min", "Relu", "Sigmoid", "Tanh", "Erf"),
}
_GROWING = {"Mul", "Pow", "Exp", "Abs", "Neg", "Where", "Clip", "Max", "Sqrt", "Reciprocal", "Sigmoid", "Div"}
_MOVING = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Flatten", "Identity", "Slice", "Gather"}

# https://onnx.ai/onnx/operators/onnx__ReduceMax.html
_AXES_ARE_INPUTS = 18

# Where lower bounds stand.
_BOUNDS = {("Clip", 1), ("Max", 0), ("Max", 1)}
# Stands for any number that float16 rounds to 0: all that float16 holds besides 0 is above each of them.
_EPSILON = 1e-12

#: What a value is: computed of sums alone, or of what was summed over too.
_Kind = Literal["sum", "whole"]


def widen(model: ir.Model) -> None:
    """Compute in float32, in place, what overflows or drifts in float16 or bfloat16.

    Args:
        model: of any opset on offer. What is float32 already, and nodes of other domains than ai.onnx, stay as they are.
    """
    keep_logarithms(model)
    for node in [node for node in model.graph.all_nodes() if node.domain == ""]:
        _name_type(node)
        _keep_finite(node, model.opset_imports[""])
    nodes = [node for node in model.graph.all_nodes() if node.domain == ""]
    wide = _chosen(nodes)
    halves = {value: value.dtype for node in wide for value in node.outputs if value.dtype in _HALF}
    for value in halves:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    ups: dict[ir.Value, ir.Value] = {}
    for node in wide:
        _read_wide(node, ups)
    for value, dtype in halves.items():
        _give_half(value, dtype, wide)
    for node in reversed(nodes) if ups or halves else ():
        _drop_if_dead(node)


def _name_type(node: ir.Node) -> None:
    """Fill in what the exporter leaves open where onnx's own inference refuses bfloat16: behind an InstanceNormalization."""
    source, made = node.inputs[0] if node.inputs else None, node.outputs[0]
    if source is None or source.dtype is None or made.dtype is not None:
        return
    if node.op_type in {*_SUMS, *_NORMS, *_POINTWISE, *_MOVING}:
        made.type = ir.TensorType(source.dtype)
    like = node.inputs[1] if node.op_type == "CastLike" else None
    if like is not None and like.dtype is not None:
        ir.convenience.replace_all_uses_with(
            made, source if like.dtype == source.dtype else _cast(source, made, like.dtype, "_cast")
        )
        _graph(made).remove(node, safe=True)


def keep_logarithms(model: ir.Model) -> None:
    """Write log(sigmoid(x)) as -softplus(-x), in place and in any precision.

    onnxruntime's float32 sigmoid is right to 6e-8 however small it is itself: its logarithm is off by 0.02 at -13. From -104 on
    it is that of a 0 everywhere.
    """
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Log" and node.domain == ""]:
        before = _maker(node.inputs[0])
        if before is not None and before.op_type == "Sigmoid" and before.inputs[0] is not None:
            _replace(node, _log_sigmoid(node, before.inputs[0]))
            _drop_if_dead(before)


def _keep_finite(node: ir.Node, opset: int) -> None:
    """Rewrite log(softmax): runtimes take the logarithm of a 0 there, from a logit of -104 on in float32."""
    source = node.inputs[0] if node.inputs else None
    if node.op_type == "LogSoftmax" and source is not None and node.outputs[0].dtype in _HALF:
        _replace(node, _log_softmax(node, source, opset))


def _replace(node: ir.Node, last: ir.Value) -> None:
    """Let ``last`` be what the node made, under its name."""
    out = node.outputs[0]
    last.name, out.name = out.name, f"{out.name}_replaced"
    ir.convenience.replace_all_uses_with(out, last, replace_graph_outputs=True)
    _graph(out).remove(node, safe=True)


def _log_sigmoid(node: ir.Node, source: ir.Value) -> ir.Value:
    shape = node.outputs[0].shape
    return _op(node, "Neg", [_op(node, "Softplus", [_op(node, "Neg", [source], shape)], shape)], shape)


def _log_softmax(node: ir.Node, source: ir.Value, opset: int) -> ir.Value:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    whole, axes = node.outputs[0].shape, _constant(node, np.array([axis]))
    rows = None if whole is None else ir.Shape([1 if i == axis % len(whole) else size for i, size in enumerate(whole)])
    if opset >= _AXES_ARE_INPUTS:
        top = _op(node, "ReduceMax", [source, axes], rows)
    else:
        top = _op(node, "ReduceMax", [source], rows, {"axes": [axis]})
    low = _op(node, "Sub", [source, top], whole)
    total = _op(node, "ReduceSum", [_op(node, "Exp", [low], whole), axes], rows)
    return _op(node, "Sub", [low, _op(node, "Log", [total], rows)], whole)


def _op(
    before: ir.Node,
    op_type: str,
    inputs: list[ir.Value],
    shape: ir.Shape | None,
    attributes: dict[str, list[int]] | None = None,
) -> ir.Value:
    node = ir.node(op_type, inputs, attributes)
    node.outputs[0].type, node.outputs[0].shape = inputs[0].type, shape
    _graph(before.outputs[0]).insert_before(before, node)
    return node.outputs[0]


def _chosen(nodes: Sequence[ir.Node]) -> dict[ir.Node, None]:
    """Return the nodes to compute in float32, in the graph's order; some of them are float32 as they are."""
    kinds: dict[ir.Value, _Kind] = {}
    wide, attention = set[ir.Node](), _scores(nodes)
    for node in nodes:
        kind = None if node in attention else _kind(node, kinds)
        if kind is not None:
            kinds.update({value: kind for value in node.outputs if value.dtype in _FLOATS})
            wide.add(node)
    wide |= _read_by_sums_alone(nodes, wide) - attention
    # What only moves is widened between two others; at the ends it moves half as much as it is.
    for node in nodes:
        if node.op_type in _MOVING and _maker(node.inputs[0]) not in wide:
            wide.discard(node)
    for node in reversed(nodes):
        if node.op_type in {*_MOVING, *_EXTREMES, "Cast"} and wide.isdisjoint(_users(node)):
            wide.discard(node)
    return {node: None for node in nodes if node in wide and node.op_type != "Cast"}


def _scores(nodes: Sequence[ir.Node]) -> set[ir.Node]:
    """Return what stands between a product and a softmax."""
    of_products, found = set[ir.Node](), set[ir.Node]()
    for node in nodes:
        makers = [maker for maker in map(_maker, node.inputs) if maker is not None]
        if any(maker.op_type in {"MatMul", "Einsum"} or maker in of_products for maker in makers):
            of_products.update({node} if node.op_type in {*_POINTWISE, *_MOVING, "Where"} else {})
    for node in reversed(nodes):
        if node in of_products and any(user.op_type == "Softmax" or user in found for user in _users(node)):
            found.add(node)
    return found


def _kind(node: ir.Node, kinds: dict[ir.Value, _Kind]) -> _Kind | None:
    """Return what a node makes of sums, given what its inputs are; None if it stays as it is."""
    if node.outputs[0].dtype not in _FLOATS:
        return None
    if node.op_type in _SUMS or node.op_type in _EXTREMES:
        return "sum"
    if node.op_type in _NORMS or _is_expm1(node):
        return "whole"
    source = None if not node.inputs or node.inputs[0] is None else kinds.get(node.inputs[0])
    if node.op_type == "Cast":  # torch rounds each sum, and would round it before it is divided
        return source if source == "sum" else None
    if node.op_type in _MOVING:
        return source
    return _meeting(node, kinds) if node.op_type in _POINTWISE else None


def _meeting(node: ir.Node, kinds: dict[ir.Value, _Kind]) -> _Kind | None:
    inputs = [value for value in node.inputs if value is not None and value.dtype in _FLOATS]
    found = {
        kinds.get(value) or ("other" if ir.convenience.get_const_tensor(value) is None else "constant") for value in inputs
    }
    if found.isdisjoint({"sum", "whole"}):
        return None
    if found <= {"sum", "constant"}:
        return "sum"
    # A residual stream that met a norm's result would be float32 up to the model's end.
    return "whole" if "other" not in found or ("sum" in found and node.op_type in _ARITHMETIC) else None


def _read_by_sums_alone(nodes: Sequence[ir.Node], wide: set[ir.Node]) -> set[ir.Node]:
    """Return what may not fit half precision and need not: nothing that stays half reads it."""
    drawing = {node for node in wide if node.op_type in {*_SUMS, "Log"} or _is_expm1(node)}
    for node in reversed(nodes):
        users = _users(node)
        if drawing.isdisjoint(users) or any(value.is_graph_output() for value in node.outputs):
            continue
        if _may_grow(node) and all(user in wide or user in drawing or _is_up(user) for user in users):
            drawing.add(node)
    return drawing


def _may_grow(node: ir.Node) -> bool:
    if node.op_type in {"Add", "Sub"}:  # of one number: a bias belongs to the product before it
        return any(value is not None and _number(value) is not None for value in node.inputs)
    return node.op_type in _GROWING or node.op_type in _MOVING or _is_up(node)


def _is_expm1(node: ir.Node) -> bool:
    """Whether the node is the difference that torch.expm1 exists to avoid, and that the exporter makes of it."""
    first, one = node.inputs if node.op_type == "Sub" else (None, None)
    before = _maker(first)
    return before is not None and before.op_type == "Exp" and one is not None and _number(one) == 1


def _read_wide(node: ir.Node, ups: dict[ir.Value, ir.Value]) -> None:
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype in _HALF:
            meant = _meant(node, index, value, value.dtype)
            node.replace_input_with(index, _up(value, ups) if meant is None else _constant(node, np.array(meant, np.float32)))


def _up(value: ir.Value, ups: dict[ir.Value, ir.Value]) -> ir.Value:
    """Return a value in float32: what was rounded to it, or one Cast for all that read it so."""
    if value not in ups:
        maker = value.producer()
        source = maker.inputs[0] if maker is not None and _is_cast(maker) else value
        assert source is not None  # noqa: S101  (a Cast has an input)
        others = [user for user, _ in value.uses() if _is_up(user)]
        ups[value] = source if source.dtype == ir.DataType.FLOAT else _cast(source, value, ir.DataType.FLOAT, "_float32")
        for other in others:
            _bypass(other, ups[value])
    return ups[value]


def _give_half(value: ir.Value, dtype: ir.DataType, wide: Mapping[ir.Node, None]) -> None:
    """Round a widened value, under the name it had, for what stays half and for the graph's outputs."""
    for user in [user for user, _ in value.uses() if _is_up(user)]:
        _bypass(user, value)
    uses = [(user, index) for user, index in value.uses() if user not in wide and not _is_up(user)]
    graph = _graph(value)
    places = [index for index, output in enumerate(graph.outputs) if output is value]
    if not uses and not places:
        return
    name, value.name = value.name, f"{value.name}_float32"
    down = _cast(value, value, dtype, "")
    down.name = name
    for user, index in uses:
        user.replace_input_with(index, down)
    for index in places:
        graph.outputs[index] = down


def _cast(source: ir.Value, after: ir.Value, dtype: ir.DataType, suffix: str) -> ir.Value:
    """Put a Cast of ``source`` right behind the node that makes ``after``."""
    node = ir.node("Cast", [source], {"to": dtype.value})
    made, maker, graph = node.outputs[0], after.producer(), _graph(after)
    made.name, made.type, made.shape = f"{after.name}{suffix}", ir.TensorType(dtype), after.shape
    if maker is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(maker, node)
    return made


def _bypass(cast: ir.Node, value: ir.Value) -> None:
    if not cast.outputs[0].is_graph_output():
        ir.convenience.replace_all_uses_with(cast.outputs[0], value)


def _drop_if_dead(node: ir.Node) -> None:
    if node.op_type in {"Cast", "Sigmoid"} and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
        _graph(node.outputs[0]).remove(node, safe=True)


def _meant(node: ir.Node, index: int, value: ir.Value, dtype: ir.DataType) -> float | None:
    """Return the number that stood in the model where half precision rounded it to one of no use."""
    number = _number(value)
    if number == 0 and dtype == ir.DataType.FLOAT16 and (node.op_type, index) in _BOUNDS and _must_not_be_0(node):
        return _EPSILON
    if node.op_type == "Pow" and index == 1 and number is not None and 0 < number < 1:
        root = 1 / round(1 / number)
        return root if abs(root / number - 1) <= _HALF[dtype] else None
    return None


def _must_not_be_0(node: ir.Node) -> bool:
    """Whether what the node makes is divided by, or its logarithm taken: its lower bound is an epsilon."""
    for user, index in node.outputs[0].uses():
        if user.op_type in {"Log", "Reciprocal"} or (user.op_type == "Div" and index == 1):
            return True
        if user.op_type in {*_MOVING, "Cast"} and _must_not_be_0(user):
            return True
    return False


def _constant(node: ir.Node, array: NDArray[Any]) -> ir.Value:
    graph = _graph(node.outputs[0])
    name = f"{array.dtype}_" + "_".join(f"{number:.9g}" for number in array.flat)
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
    return graph.initializers[name]


def _number(value: ir.Value) -> float | None:
    tensor = ir.convenience.get_const_tensor(value)
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def _is_cast(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.domain == ""


def _is_up(node: ir.Node) -> bool:
    source = node.inputs[0] if _is_cast(node) else None
    return source is not None and source.dtype in _FLOATS and node.outputs[0].dtype == ir.DataType.FLOAT


def _maker(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _users(node: ir.Node) -> set[ir.Node]:
    return {user for value in node.outputs for user, _ in value.uses()}


def _graph(value: ir.Value) -> ir.Graph:
    maker = value.producer()
    graph = value.graph if maker is None else maker.graph
    assert isinstance(graph, ir.Graph)  # noqa: S101  (of a model whose functions are inlined)
    return graph


def round_outputs(model: ir.Model, dtype: ir.DataType) -> None:
    """Give every floating-point output of the graph this type: the exporter drops a last Cast behind some sums."""
    for index, value in enumerate(model.graph.outputs):
        if value.dtype != ir.DataType.FLOAT or dtype == ir.DataType.FLOAT:
            continue
        cast = ir.node("Cast", [value], {"to": dtype.value}, name=f"{value.name}_rounded")
        rounded, name = cast.outputs[0], value.name
        rounded.type, rounded.shape = ir.TensorType(dtype), value.shape
        model.graph.append(cast)
        model.graph.outputs[index] = rounded
        value.name, rounded.name = f"{name}_wide", name
