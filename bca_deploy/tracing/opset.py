"""A graph of the opset that the exporter builds, as one of the opset asked for: rewritten node by node, or called newer.

torch's exporter builds opset 18; asked for 17 it may keep 18, or write a 17 that onnx.checker refuses, both without an error.

Requires: a model of opset 18, its functions too. Ensures: opset 17 in the model, its functions and all subgraphs, every node in
a form that is valid there; or an error that names every node without one, and a model that is what it was.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import onnx.defs
import onnx_ir as ir

from bca_deploy.errors import ExportError

_FROM, _TO = 18, 17
# https://onnx.ai/onnx/operators/onnx__Range.html: stash_type says in what half-precision ranges are computed.
_ONLY_MORE_ATTRIBUTES = {("Range", 27)}
_LOGICAL = {"BitwiseAnd": "And", "BitwiseNot": "Not", "BitwiseOr": "Or", "BitwiseXor": "Xor"}
# Attributes that opset 18 added, with the value at which the node does what it does in 17.
_ADDED: dict[str, dict[str, object]] = {
    "LpPool": {"ceil_mode": 0, "dilations": None},
    "Resize": {"antialias": 0, "axes": None, "keep_aspect_ratio_policy": "stretch"},
}
# https://onnx.ai/onnx/operators/onnx__Pad.html
_WRAP = 19

_TRACE = "pkg.torch.onnx.stack_trace"
_FRAME = re.compile(r'File "(?P<path>[^"]*?(?P<name>[^"\\/]+))", line (?P<line>\d+)')
# "<eval_with_key>" is the code that torch.fx writes.
_NOT_THE_USERS = re.compile(r"[\\/](?:site|dist)-packages[\\/](?:torch|onnxscript|onnx_ir)[\\/]|^<eval_with_key>")

#: What makes a node valid in opset 17; nothing is changed before every node has one.
_Edit = Callable[[], None]
_Source = ir.Value | np.ndarray | None


class _NoFormError(Exception):
    """Why a node has no form in opset 17, and the lowest opset that has it."""

    def __init__(self, why: str, opset: int = _FROM) -> None:
        super().__init__(why)
        self.opset = opset


def lower_to_17(model: ir.Model) -> None:
    """Rewrite the model in place as opset 17. Constants that no node reads any more stay, for the caller to remove.

    Args:
        model: of opset 18, its functions too. Nodes of other domains are left alone.

    Raises:
        ExportError: a node has no form in opset 17; the message names all such nodes. The model is then unchanged.
    """
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        _check_opset(body)
    nodes = [node for body in bodies for node in body.all_nodes() if node.domain == ""]
    for edit in _edits(nodes):
        edit()
    _set_opset(bodies, nodes, _TO)


def raise_to(model: ir.Model, opset: int) -> None:
    """Call a model one of a newer opset, in which none of its operators is another.

    Args:
        model: checked at its own opset; changed in place.
        opset: not below the model's.

    Raises:
        ExportError: an operator changed in between; the model is then unchanged.
    """
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    nodes = [node for body in bodies for node in body.all_nodes() if node.domain == ""]
    before = model.opset_imports[""]
    changed = {node.op_type for node in nodes if not _is_same(node.op_type, before, opset)}
    if changed:
        raise ExportError(
            f"{', '.join(sorted(changed))} changed between opset {before} and {opset}; export with --opset {before}"
        )
    _set_opset(bodies, nodes, opset)


def _set_opset(bodies: Sequence[ir.Graph | ir.Function], nodes: Iterable[ir.Node], opset: int) -> None:
    for node in nodes:
        node.version = None  # that of the graph
    for graph in [*bodies, *(inner for body in bodies for inner in body.subgraphs())]:
        if "" in graph.opset_imports:
            graph.opset_imports[""] = opset


def _is_same(operator: str, before: int, after: int) -> bool:
    """Whether an operator is in both opsets the same; the newer may have attributes more, whose defaults are what it did."""
    old, new = (onnx.defs.get_schema(operator, opset, "") for opset in (before, after))
    return old.since_version == new.since_version or (operator, new.since_version) in _ONLY_MORE_ATTRIBUTES


def source_line(node: ir.Node) -> str | None:
    """Return the innermost line of the user's code that made the node, as ``model.py:41``; None where it is not known."""
    frames = _FRAME.finditer(node.metadata_props.get(_TRACE, ""))
    users = [frame for frame in frames if not _NOT_THE_USERS.search(frame["path"])]
    return f"{users[-1]['name']}:{users[-1]['line']}" if users else None


def _check_opset(body: ir.Graph | ir.Function) -> None:
    opset = body.opset_imports.get("", _FROM if isinstance(body, ir.Function) else None)
    if opset != _FROM:
        raise ExportError(f"{body.name} is of opset {opset}; only opset {_FROM} is lowered to {_TO}; please report this")


def _edits(nodes: Sequence[ir.Node]) -> list[_Edit]:
    edits: list[_Edit] = []
    refused: list[tuple[ir.Node, _NoFormError]] = []
    for node in nodes:
        try:
            edits.extend(_edits_of(node))
        except _NoFormError as reason:
            refused.append((node, reason))
    if refused:
        raise ExportError(_message(refused))
    return edits


def _message(refused: Sequence[tuple[ir.Node, _NoFormError]]) -> str:
    # A layer that is used twelve times is one line to change.
    counts = Counter(_described(node, reason) for node, reason in refused)
    lines = [f"  {text}" + (f" ({count} nodes)" if count > 1 else "") for text, count in counts.items()]
    enough = max(reason.opset for _, reason in refused)
    head = f"opset {_TO} has no form for {len(refused)} of the graph's nodes:"
    return "\n".join([head, *lines, f"export with --opset {enough} or higher, or write these lines in another way"])


def _described(node: ir.Node, reason: _NoFormError) -> str:
    line = source_line(node)
    return f"{node.op_type}{f' at {line}' if line else ''}: {reason}; opset {reason.opset} is the lowest that has it"


def _edits_of(node: ir.Node) -> Iterator[_Edit]:
    """Yield at most one edit: an operator that opset 18 did not change is the same in 17."""
    since = _since(node.op_type)
    if since is None:
        yield _refuse(node)
    elif since == _FROM and any(attribute.is_ref() for attribute in node.attributes.values()):
        raise _NoFormError("an attribute is left to the caller of its function")
    elif since == _FROM:
        yield _rule(node.op_type)(node)


@cache
def _since(operator: str) -> int | None:
    """Return the opset that gave the operator the form it has in opset 18, None where that has no such operator."""
    try:
        return int(onnx.defs.get_schema(operator, _FROM, "").since_version)
    except onnx.defs.SchemaError:
        return None


def _rule(operator: str) -> Callable[[ir.Node], _Edit]:
    if operator.startswith("Reduce"):
        return _reduce
    if operator in _LOGICAL:
        return _bitwise
    if operator in _ADDED:
        return _without_added
    rules = {"Mish": _mish, "Pad": _pad, "ScatterElements": _scatter, "ScatterND": _scatter, "Split": _split}
    return rules.get(operator, _refuse)


# ---- one rule for each operator that opset 18 changed: what the node becomes


def _refuse(node: ir.Node) -> _Edit:
    schemas = [s for s in onnx.defs.get_all_schemas_with_history() if (s.domain, s.name) == ("", node.op_type)]
    # GroupNormalization was born deprecated.
    opset = min((schema.since_version for schema in schemas if not schema.deprecated), default=None)
    if opset is None:
        raise ExportError(f"{node.op_type} is no operator of ai.onnx; please report this")
    raise _NoFormError("the operator is new" if opset > _TO else f"opset {_FROM} changed it", max(opset, _FROM))


def _reduce(node: ir.Node) -> _Edit:
    """The axes go back from an input into an attribute."""
    axes = _constant(node, 1, "axes")
    found = [] if axes is None else [int(axis) for axis in axes.reshape(-1)]
    if not found and _value(node, "noop_with_empty_axes", 0):
        raise _NoFormError("noop_with_empty_axes, with no axes")
    attributes = {"axes": ir.AttrInt64s("axes", found)} if found else {}
    return partial(_become, node, node.inputs[:1], drop=["noop_with_empty_axes"], attributes=attributes)


def _split(node: ir.Node) -> _Edit:
    """Without sizes, opset 17 splits evenly; opset 18 leaves the rest of a division to the last part."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return partial(_become, node, node.inputs, drop=["num_outputs"])
    dims, parts = _dims(node), len(node.outputs)
    size = None if dims is None else dims[_value(node, "axis", 0)]
    if size is None:
        raise _NoFormError(f"{parts} parts of a dimension whose size is known only at run time")
    if size % parts == 0:
        return partial(_become, node, node.inputs[:1], drop=["num_outputs"])
    part = -(-size // parts)
    sizes = np.array([part] * (parts - 1) + [size - part * (parts - 1)], np.int64)
    return partial(_become, node, [node.inputs[0], sizes], drop=["num_outputs"])


def _pad(node: ir.Node) -> _Edit:
    """Pads along some axes become pads along all."""
    if _value(node, "mode", "constant") == "wrap":
        raise _NoFormError("mode wrap", _WRAP)
    axes = _constant(node, 3, "axes")
    if axes is None:
        return partial(_become, node, node.inputs[:3])
    pads, dims = _constant(node, 1, "pads along some axes"), _dims(node)
    if pads is None or dims is None:
        raise _NoFormError("pads along some axes of an input of unknown rank")
    full = np.zeros((2, len(dims)), np.int64)
    full[:, axes] = pads.reshape(2, -1)
    return partial(_become, node, [node.inputs[0], full.reshape(-1), *node.inputs[2:3]])


def _without_added(node: ir.Node) -> _Edit:
    added = _ADDED[node.op_type]
    for name, neutral in added.items():
        if (value := _value(node, name, neutral)) != neutral:
            raise _NoFormError(f"attribute {name}={value}")
    return partial(_become, node, node.inputs, drop=list(added))


def _scatter(node: ir.Node) -> _Edit:
    reduction = _value(node, "reduction", "none")
    if reduction not in {"none", "add", "mul"}:
        raise _NoFormError(f"reduction {reduction}")
    return partial(_become, node, node.inputs)


def _bitwise(node: ir.Node) -> _Edit:
    # All are of one type; what stands between nodes may not say which.
    if ir.DataType.BOOL not in {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}:
        raise _NoFormError("bit operations on integers")
    return partial(_become, node, node.inputs, operator=_LOGICAL[node.op_type])


def _mish(node: ir.Node) -> _Edit:
    return partial(_spell_mish, node)


# ---- the edits


def _spell_mish(node: ir.Node) -> None:
    """Mish(x) = x * tanh(softplus(x)). The node itself stays, as the product."""
    x, out = node.inputs[0], node.outputs[0]
    parts = [ir.Value(name=f"{out.name}_{part}", type=out.type, shape=out.shape) for part in ("softplus", "tanh")]
    _put_before(node, ir.node("Softplus", [x], outputs=parts[:1]))
    _put_before(node, ir.node("Tanh", parts[:1], outputs=parts[1:]))
    _become(node, [x, parts[1]], operator="Mul")


def _become(
    node: ir.Node,
    inputs: Sequence[_Source],
    operator: str | None = None,
    drop: Sequence[str] = (),
    attributes: Mapping[str, ir.Attr] | None = None,
) -> None:
    """Change a node in place: it keeps its outputs and where it comes from. Arrays become constants before it."""
    values = [_stored(node, source) if isinstance(source, np.ndarray) else source for source in inputs]
    node.resize_inputs(len(values))
    for index, value in enumerate(values):
        node.replace_input_with(index, value)
    for name in drop:
        node.attributes.pop(name, None)
    node.attributes.update(attributes or {})
    node.op_type = operator or node.op_type


def _stored(node: ir.Node, array: np.ndarray) -> ir.Value:
    """A constant node, as functions have no initializers; named after an output, whose name the whole model has once."""
    tensor = ir.tensor(array)
    value = ir.Value(name=f"{node.outputs[0].name}_sizes", type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    _put_before(node, ir.node("Constant", [], {"value": tensor}, outputs=[value]))
    return value


def _put_before(node: ir.Node, new: ir.Node) -> None:
    new.name = new.outputs[0].name
    new.metadata_props.update(node.metadata_props)
    node.prepend(new)


# ---- reading a node


def _value(node: ir.Node, name: str, default: object) -> Any:  # whatever the attribute holds
    return node.attributes[name].value if name in node.attributes else default


def _constant(node: ir.Node, index: int, what: str) -> np.ndarray | None:
    """Return the value of an optional input, None where it is left out."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    # An initializer that is an input as well is only a default.
    tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise _NoFormError(f"its {what} are computed at run time")
    return tensor.numpy()


def _dims(node: ir.Node) -> list[int | None] | None:
    """Return the first input's sizes, None for one that is known only at run time; None where the rank is unknown too."""
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    return None if shape is None else [dim if isinstance(dim, int) else None for dim in shape]
