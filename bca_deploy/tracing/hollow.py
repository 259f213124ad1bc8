"""A trace without weights: its weights are inputs, each with the name of what it takes in its metadata.

A trace is a module operation by operation, before anything is folded, joined or split. So what becomes of weights behind it is
done again on others, and their graph needs no module. Ensures: weights that are put back are in the trace bit by bit as before.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

# What an input of a trace takes, in its metadata.
_KEY = "weight"
# What stands in front of a weight's name in the traced module.
_ROOT = "model."
#: Tensors by name.
State = Mapping[str, Tensor]


def hollow(traced: ir.Model, weights: State, unnamed: Collection[str] = ()) -> tuple[onnx.ModelProto, set[str]]:
    """Return a trace in which weights are inputs; ``traced`` is used up.

    Args:
        traced: from :func:`bca_deploy.tracing.graph.trace_module`.
        weights: their values by name, of the module as it was traced.
        unnamed: those that the trace may hold under names of its own, as it does what is no parameter of the module.

    Returns:
        The trace, and the unnamed weights that it may hold: all of their numbers are one, and so are those of a constant in it.
    """
    unclear = set[str]()
    for name, value in list(traced.graph.initializers.items()):
        raw = getattr(value.const_value, "raw", None)
        if not isinstance(raw, Tensor):
            continue
        plain = name.removeprefix(_ROOT)
        named = plain in weights and same_bytes(weights[plain], raw)
        keys = [plain] if named else [key for key in unnamed if same_bytes(weights[key], raw)]
        if named or (keys and _varies(raw)):
            del traced.graph.initializers[name]
            value.const_value, value.metadata_props[_KEY] = None, keys[0]
            traced.graph.inputs.append(value)
        else:
            unclear.update(keys)
    return ir.to_proto(traced), unclear


def _varies(tensor: Tensor) -> bool:
    flat = tensor.reshape(-1)
    return bool((flat != flat[:1]).any())


def write_trace(trace: onnx.ModelProto, path: Path) -> None:
    """Write a hollow trace; the same trace gives the same bytes."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(_plain(trace).SerializeToString(deterministic=True))


def _plain(trace: onnx.ModelProto) -> onnx.ModelProto:
    """Return a trace without what differs from machine to machine: stack traces hold paths, and the user's source."""
    proto = onnx.ModelProto()
    proto.CopyFrom(trace)
    del proto.metadata_props[:]
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        del graph.metadata_props[:]
        graph.doc_string = ""
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
            graphs += [inner for attribute in node.attribute for inner in (attribute.g, *attribute.graphs) if inner.node]
        for value in (*graph.value_info, *graph.output):
            del value.metadata_props[:]
        for value in graph.input:
            kept = [prop for prop in value.metadata_props if prop.key == _KEY]
            del value.metadata_props[:]
            value.metadata_props.extend(kept)
    return proto


def keys_of(proto: onnx.ModelProto) -> dict[str, str]:
    """Return for each input of a hollow trace that is a weight, what it takes."""
    return {value.name: prop.value for value in proto.graph.input for prop in value.metadata_props if prop.key == _KEY}


def filled(proto: onnx.ModelProto, weights: State) -> ir.Model:
    """Return a trace with weights in it."""
    keys, model = keys_of(proto), ir.from_proto(proto)
    for value in [value for value in model.graph.inputs if value.name in keys]:
        model.graph.inputs.remove(value)
        value.const_value = TorchTensor(weights[keys[str(value.name)]].contiguous(), name=value.name)
        model.graph.register_initializer(value)
    return model


def feeds(proto: onnx.ModelProto, weights: State) -> dict[str, NDArray[Any]]:
    """Return the weights as inputs of a hollow trace, floats in float64."""
    keys = keys_of(proto)
    return {name: _wide(weights[key]).numpy() for name, key in keys.items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def own_inputs(proto: onnx.ModelProto) -> Iterator[str]:
    """Yield the names of the inputs that are the model's."""
    keys = keys_of(proto)
    yield from (value.name for value in proto.graph.input if value.name not in keys)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(bytes_of(one), bytes_of(other))


def bytes_of(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, flat."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
