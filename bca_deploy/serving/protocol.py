"""Tensors of the Open Inference Protocol to numpy, and its gRPC requests. Refuses what only a server can see.

What the model may be given is session/contract.py's business; here are bytes that do not add up, sizes no array can have, names
given twice. Requires numpy alone.
"""

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.errors import InputError, nearest

Array = NDArray[Any]

#: Of the model; there is one, and the protocol lets a client name it.
VERSION = "1"
#: The protocol's element types and numpy's. The session says which of them a model takes.
NUMPY = {
    "BOOL": "bool",
    "FP16": "float16",
    "BF16": "bfloat16",
    "FP32": "float32",
    "FP64": "float64",
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
}
DATATYPE = {numpy: datatype for datatype, numpy in NUMPY.items()}

#: Where a gRPC request without raw contents has its values; half precisions have no such place.
_CONTENTS = {
    "BOOL": "bool_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
}
_LARGEST_SIZE, _MOST_AXES = 2**31 - 1, 8


@dataclass(frozen=True)
class Request:
    """What a client asks for.

    Attributes:
        inputs: arrays by name; they may share memory with the request.
        outputs: for each output wanted whether it comes as bytes; empty means all of them.
        id: the client's own, given back.
        binary: whether outputs that were not asked for by name come as bytes.
        cast: let the session convert dtypes.
    """

    inputs: dict[str, Array]
    outputs: dict[str, bool] = field(default_factory=dict)
    id: str = ""
    binary: bool = True
    cast: bool = False


@dataclass(frozen=True)
class Answer:
    """The outputs that were wanted, by name, and the request they belong to."""

    request: Request
    outputs: dict[str, Array]


def described(axes: Iterable[int | str]) -> list[int]:
    """Return a tensor's shape for the protocol's metadata; -1 is a size that varies."""
    return [axis if isinstance(axis, int) else -1 for axis in axes]


def wanted(request: Request, outputs: Mapping[str, Array]) -> Answer:
    """Return the answer that holds only what was asked for.

    Raises:
        InputError: an output that the model does not give.
    """
    check_outputs(request, outputs)
    return Answer(request, {name: outputs[name] for name in request.outputs or outputs})


def check_outputs(request: Request, known: Iterable[str]) -> None:
    """Refuse an output that is not ``known``."""
    names = list(known)
    for name in request.outputs:
        if name not in names:
            raise InputError(f"the model has no output {name!r}{nearest(name, names)}; it gives {', '.join(names)}")


def from_grpc(message: Any) -> Request:
    """Read a ``ModelInferRequest``; the arrays share its memory.

    Raises:
        InputError: sizes, bytes or names that do not add up.
    """
    for tensor in (*message.inputs, *message.outputs):
        refuse_shared_memory(tensor.name, tensor.parameters)
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InputError(f"{len(raw)} raw_input_contents for {len(message.inputs)} inputs; give one for each, in order")
    inputs: dict[str, Array] = {}
    for index, tensor in enumerate(message.inputs):
        dtype = dtype_of(tensor.name, tensor.datatype)
        if raw:
            if tensor.HasField("contents"):
                raise InputError(f"input {tensor.name} has contents, and the request raw_input_contents; give one of them")
            array = from_bytes(tensor.name, dtype, tensor.shape, raw[index])
        else:
            array = from_values(tensor.name, dtype, tensor.shape, _contents(tensor))
        add(inputs, tensor.name, array)
    return Request(inputs, outputs_of((o.name, True) for o in message.outputs), message.id, cast=_flag(message.parameters))


def refuse_shared_memory(name: str, parameters: Container[str]) -> None:
    """Refuse a tensor that is to be found, or left, where this server does not look; an answer as bytes would not be seen.

    Raises:
        InputError: it is one.
    """
    if "shared_memory_region" in parameters:
        raise InputError(f"{name} is in shared memory, which this server does not use; send it, and take it, as bytes")


def _flag(parameters: Any) -> bool:
    return "cast" in parameters and bool(parameters["cast"].bool_param)


def _contents(tensor: Any) -> Array:
    place = _CONTENTS.get(tensor.datatype)
    if place is None:
        raise InputError(f"input {tensor.name} is {tensor.datatype}, which travels as raw_input_contents alone")
    return np.array(getattr(tensor.contents, place))


def dtype_of(name: str, datatype: str) -> np.dtype[Any]:
    """Return numpy's element type for the protocol's, which ``name`` has.

    Raises:
        InputError: the protocol has no such numbers.
    """
    if datatype not in NUMPY:
        raise InputError(f"input {name} has datatype {datatype[:40]!r}; the protocol's numbers are {', '.join(NUMPY)}")
    if datatype == "BF16":
        import ml_dtypes  # noqa: F401  (gives numpy the name)
    return np.dtype(NUMPY[datatype])


def from_bytes(name: str, dtype: np.dtype[Any], shape: Iterable[int], raw: Any) -> Array:
    """Return an array over the bytes, without a copy where they are aligned.

    Raises:
        InputError: impossible sizes, or another number of bytes than they need.
    """
    sizes = _sizes(name, shape)
    needed = math.prod(sizes) * dtype.itemsize
    if len(raw) != needed:
        raise InputError(f"input {name} has {len(raw)} bytes, and {needed} are needed for {list(sizes)} {dtype}")
    # Inside a body a tensor begins at any byte.
    return np.require(_shaped(name, np.frombuffer(raw, dtype), sizes), requirements="A")


def from_values(name: str, dtype: np.dtype[Any], shape: Iterable[int], values: Array) -> Array:
    """Return an array of the values, which came as JSON or as a protobuf list.

    Raises:
        InputError: impossible sizes, another number of values, values of another kind, or too large ones.
    """
    sizes = _sizes(name, shape)
    if values.size != math.prod(sizes):
        raise InputError(f"input {name} has {values.size} values, and {math.prod(sizes)} are needed for {list(sizes)}")
    if values.size and values.dtype.kind not in {"b": "b", "i": "iu", "u": "iu"}.get(dtype.kind, "iuf"):
        raise InputError(f"input {name}: its data are {values.dtype}, and its datatype is {DATATYPE[dtype.name]}")
    if dtype.kind in "iu" and values.size:
        _check_range(name, dtype, int(values.min()), int(values.max()))
    with np.errstate(over="ignore"):
        array = _shaped(name, values.astype(dtype), sizes)
    if values.dtype.kind == "f" and np.isfinite(values).all() and not np.isfinite(array.astype(np.float64)).all():
        raise InputError(f"input {name} holds {np.abs(values).max():.3g}, more than {dtype} can; scale it down")
    return array


def _check_range(name: str, dtype: np.dtype[Any], least: int, most: int) -> None:
    allowed = np.iinfo(dtype)
    if least < allowed.min or most > allowed.max:
        raise InputError(f"input {name} holds {least} to {most}, and {dtype} holds {allowed.min} to {allowed.max}")


def _sizes(name: str, shape: Iterable[int]) -> tuple[int, ...]:
    sizes = tuple(shape)
    if len(sizes) > _MOST_AXES:
        raise InputError(f"input {name} has {len(sizes)} axes; no input has more than {_MOST_AXES}")
    for index, size in enumerate(sizes):
        if not 0 <= size <= _LARGEST_SIZE:
            raise InputError(f"input {name}: axis {index} is {size}; no size is below 0 or above {_LARGEST_SIZE}")
    return sizes


def _shaped(name: str, flat: Array, sizes: tuple[int, ...]) -> Array:
    try:
        return flat.reshape(sizes)
    except ValueError:  # an empty array of an impossible size
        raise InputError(f"input {name} of {list(sizes)} is larger than any array") from None


def add(inputs: dict[str, Array], name: str, array: Array) -> None:
    """Put an input among the others.

    Raises:
        InputError: it is there already.
    """
    if name in inputs:
        raise InputError(f"input {name} is given twice")
    inputs[name] = array


def outputs_of(asked: Iterable[tuple[str, bool]]) -> dict[str, bool]:
    """Return, for each output asked for, whether it is to come as bytes.

    Raises:
        InputError: one is asked for twice.
    """
    found: dict[str, bool] = {}
    for name, binary in asked:
        if name in found:
            raise InputError(f"output {name} is asked for twice")
        found[name] = binary
    return found
