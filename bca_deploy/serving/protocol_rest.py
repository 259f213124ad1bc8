"""The Open Inference Protocol's REST requests and answers: JSON, and after it the binary tensors, with no list in between."""

from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, StrictBool, StrictInt, ValidationError

from bca_deploy.errors import InputError
from bca_deploy.serving import protocol

#: What JSON's values are called, by the types that they come as.
_JSON = {
    **dict.fromkeys((int, float), "numbers"),
    bool: "true and false",
    str: "text",
    type(None): "null",
    dict: "an object",
    list: "a list",
}


class _Parameters(BaseModel):
    binary_data_size: Annotated[StrictInt, Field(ge=0)] | None = None
    binary_data: StrictBool | None = None
    binary_data_output: StrictBool = False
    cast: StrictBool = False
    shared_memory_region: Any = None


class _Tensor(BaseModel):
    name: str
    datatype: str
    shape: list[StrictInt]
    parameters: _Parameters = _Parameters()
    data: Any = None


class _Output(BaseModel):
    name: str
    parameters: _Parameters = _Parameters()


class _Body(BaseModel):
    inputs: list[_Tensor]
    outputs: list[_Output] = []
    id: str = ""
    parameters: _Parameters = _Parameters()


def from_rest(body: bytes | bytearray, header_length: str | None) -> protocol.Request:
    """Read the body of a REST request: JSON, and after its first ``header_length`` bytes the binary tensors.

    Raises:
        InputError: no JSON of the protocol, or sizes, bytes or names that do not add up.
    """
    length = _header_length(header_length, len(body))
    parsed, binary = _parse(body[:length]), memoryview(body)[length:]
    both: list[_Tensor | _Output] = [*parsed.inputs, *parsed.outputs]
    for named in both:
        protocol.refuse_shared_memory(named.name, named.parameters.model_fields_set)
    inputs: dict[str, protocol.Array] = {}
    for tensor in parsed.inputs:
        array, binary = _from_rest(tensor, binary)
        protocol.add(inputs, tensor.name, array)
    if len(binary):
        raise InputError(f"{len(binary)} bytes are left over after the last binary tensor; check every binary_data_size")
    every = parsed.parameters.binary_data_output
    asked = ((o.name, every if o.parameters.binary_data is None else o.parameters.binary_data) for o in parsed.outputs)
    return protocol.Request(inputs, protocol.outputs_of(asked), parsed.id, every, parsed.parameters.cast)


def _header_length(given: str | None, body: int) -> int:
    if given is None:
        return body
    if not (given.isascii() and given.isdecimal() and 0 < len(given) < 12 and int(given) <= body):
        raise InputError(
            f"Inference-Header-Content-Length is {given[:40]!r}, and the body has {body} bytes; it may not be more"
        )
    return int(given)


def _parse(text: bytes | bytearray) -> _Body:
    import orjson

    try:
        return _Body.model_validate(orjson.loads(text))
    except orjson.JSONDecodeError as error:  # too deep a nesting is one as well
        raise InputError(f"the request is not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise InputError(f"the request's {where}: {first['msg']}") from None


def _from_rest(tensor: _Tensor, binary: memoryview) -> tuple[protocol.Array, memoryview]:
    dtype, size = protocol.dtype_of(tensor.name, tensor.datatype), tensor.parameters.binary_data_size
    if size is None:
        if tensor.data is None:
            raise InputError(f"input {tensor.name} has neither data nor a binary_data_size")
        return protocol.from_values(tensor.name, dtype, tensor.shape, _flat(tensor)), binary
    if tensor.data is not None:
        raise InputError(f"input {tensor.name} has both data and a binary_data_size; give one of them")
    if size > len(binary):
        raise InputError(f"input {tensor.name} has a binary_data_size of {size}, and {len(binary)} bytes are left in the body")
    return protocol.from_bytes(tensor.name, dtype, tensor.shape, binary[:size]), binary[size:]


def _flat(tensor: _Tensor) -> protocol.Array:
    """Return the values in a row; nested otherwise than the shape says they would be another tensor, such as its transpose."""
    # As it came: one string among numbers would make a long one of each.
    nested = np.array(tensor.data, dtype=object)
    cells = nested.reshape(-1).tolist()
    kinds = {_JSON[kind] for kind in set(map(type, cells))}
    if "a list" in kinds:
        raise InputError(f"input {tensor.name}: data is ragged or too deep; give a flat list, or one nested as the shape says")
    if others := kinds - {"numbers", "true and false"}:
        said = ", ".join(sorted(others))
        raise InputError(f"input {tensor.name}: its data hold {said}; give numbers, true and false alone")
    if len(kinds) > 1:
        raise InputError(f"input {tensor.name}: its data hold numbers and true or false; give one kind alone")
    if cells and nested.ndim != 1 and list(nested.shape) != tensor.shape:
        raise InputError(
            f"input {tensor.name}: data is nested as {list(nested.shape)}, and its shape is {tensor.shape[:9]}; "
            "give a flat list, or one nested as the shape says"
        )
    return np.array(cells)


def to_rest(answer: protocol.Answer, model: str) -> tuple[bytes, int | None]:
    """Return the body of a REST response, and the length of its JSON where binary tensors follow.

    Raises:
        InputError: an output whose element type JSON has not.
    """
    import orjson

    entries: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for name, array in answer.outputs.items():
        entry: dict[str, Any] = {"name": name, "datatype": protocol.DATATYPE[array.dtype.name], "shape": list(array.shape)}
        if answer.request.outputs.get(name, answer.request.binary):
            binary.append(array.tobytes())
            entry["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            entry["data"] = _json(name, array)
        entries.append(entry)
    about = {"model_name": model, "model_version": protocol.VERSION, "id": answer.request.id}
    head = orjson.dumps({**about, "outputs": entries}, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join((head, *binary)), len(head) if binary else None


def _json(name: str, array: protocol.Array) -> protocol.Array:
    if array.dtype.itemsize == 2:
        raise InputError(f"output {name} is {array.dtype}, which JSON cannot hold; ask for it as binary_data")
    return np.ascontiguousarray(array).reshape(-1)
