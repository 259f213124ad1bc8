"""Tensors of the protocol: what goes in comes out, and bytes that do not add up are refused by name."""

import contextlib
import json
from typing import Any

import ml_dtypes
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from bca_deploy.errors import InputError
from bca_deploy.serving import protocol, protocol_rest

X = np.arange(24, dtype=np.float32).reshape(1, 2, 12)
MASK = np.array([[True, False]])


def rest(*tensors: dict[str, Any], binary: bytes = b"", **more: Any) -> protocol.Request:
    head = json.dumps({"inputs": list(tensors), **more}).encode()
    return protocol_rest.from_rest(head + binary, str(len(head)))


def entry(name: str, array: np.ndarray, **changes: Any) -> dict[str, Any]:
    """An input whose bytes follow the JSON."""
    parameters = {"binary_data_size": array.nbytes}
    made = {"name": name, "datatype": protocol.DATATYPE[array.dtype.name], "shape": list(array.shape), "parameters": parameters}
    return made | changes


def grpc(name: str, datatype: str, shape: list[int], raw: bytes | None = None, **contents: Any) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="m", id="7")
    tensor = message.inputs.add(name=name, datatype=datatype, shape=shape)
    if raw is not None:
        message.raw_input_contents.append(raw)
    for field, values in contents.items():
        getattr(tensor.contents, field).extend(values)
    return message


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int64, np.uint8, ml_dtypes.bfloat16, np.bool_])
def test_binary_tensors_come_as_they_were_sent(dtype: Any) -> None:
    array = (np.arange(6).reshape(2, 3) % 2).astype(dtype)
    datatype = protocol.DATATYPE[array.dtype.name]
    by_grpc = protocol.from_grpc(grpc("x", datatype, [2, 3], array.tobytes())).inputs["x"]
    by_rest = rest(entry("x", array), binary=array.tobytes()).inputs["x"]
    for got in (by_grpc, by_rest):
        assert got.dtype == dtype
        assert np.array_equal(got, array)


def test_grpc_tensors_share_the_memory_of_the_message() -> None:
    raw = X.tobytes()
    array = protocol.from_bytes("x", np.dtype(np.float32), [1, 2, 12], raw)
    assert np.shares_memory(array, np.frombuffer(raw, np.uint8))


def test_a_tensor_that_begins_at_any_byte_of_a_body_is_aligned_for_the_runtime() -> None:
    for padding in range(8):
        got = rest(entry("x", X), binary=X.tobytes(), id="i" * padding).inputs["x"]
        assert got.flags.aligned
        assert np.array_equal(got, X)


@pytest.mark.parametrize(("datatype", "field", "values"), [
    ("FP32", "fp32_contents", [0.5, 2]), ("FP64", "fp64_contents", [0.5, 2]), ("BOOL", "bool_contents", [True, False]),
    ("INT32", "int_contents", [-1, 2]), ("UINT8", "uint_contents", [1, 2]), ("INT64", "int64_contents", [-1, 2]),
])  # fmt: skip
def test_grpc_tensors_may_come_as_values(datatype: str, field: str, values: list[Any]) -> None:
    got = protocol.from_grpc(grpc("x", datatype, [2], **{field: values})).inputs["x"]
    assert got.tolist() == values
    assert got.dtype == protocol.NUMPY[datatype]


@pytest.mark.parametrize("data", [X.tolist(), X.reshape(-1).tolist()], ids=["nested", "flat"])
def test_json_data_may_be_flat_or_nested(data: list[Any]) -> None:
    got = rest({"name": "x", "datatype": "FP32", "shape": [1, 2, 12], "data": data}).inputs["x"]
    assert np.array_equal(got, X)
    assert got.dtype == np.float32


@pytest.mark.parametrize("shape", [(2, 12), (12, 2), (1, 12, 2), (24, 1), (1, 24), (1, 2, 12, 1)])
def test_json_data_nested_against_the_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"input x: data is nested as \[.*\], and its shape is \[1, 2, 12\]; give a flat"):
        rest({"name": "x", "datatype": "FP32", "shape": [1, 2, 12], "data": X.reshape(shape).tolist()})


@pytest.mark.parametrize("datatype", ["FP32", "BOOL", "INT64"])
@pytest.mark.parametrize("data", [[1, True], [[0.5], [False]], [True, 0]], ids=str)
def test_true_among_numbers_is_refused(datatype: str, data: list[Any]) -> None:
    with pytest.raises(InputError, match="input x: its data hold numbers and true or false; give one kind alone"):
        rest({"name": "x", "datatype": datatype, "shape": [2], "data": data})


def test_what_a_client_asks_for_is_kept() -> None:
    outputs = [{"name": "out", "parameters": {"binary_data": False}}, {"name": "context_out"}]
    got = rest(
        entry("x", X), binary=X.tobytes(), id="9", outputs=outputs, parameters={"binary_data_output": True, "cast": True}
    )
    assert got.outputs == {"out": False, "context_out": True}
    assert (got.id, got.cast, got.binary) == ("9", True, True)
    message = grpc("x", "FP32", [1], b"\0\0\0\0")
    message.parameters["cast"].bool_param = True
    message.outputs.add(name="out")
    asked = protocol.from_grpc(message)
    assert (asked.id, asked.cast, asked.outputs) == ("7", True, {"out": True})


NESTED: Any = 1
for _ in range(100):
    NESTED = [NESTED]

REST_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "negative size": (entry("x", X, shape=[-1, 2, 12]), "input x: axis 0 is -1; no size is below 0"),
    "overflowing size": (entry("x", X, shape=[2**62, 2, 12]), "axis 0 is 4611686018427387904; no size is below 0 or above"),
    "sizes that multiply over": (entry("x", X, shape=[2**31 - 1] * 3), r"input x has 96 bytes, and \d+ are needed"),
    "size beyond 64 bits": (entry("x", X, shape=[2**70, 1, 1]), "inputs.0.shape.0: Input should be a valid integer"),
    "too many axes": (entry("x", X, shape=[1] * 70), "input x has 70 axes; no input has more than 8"),
    "size of the wrong kind": (entry("x", X, shape=["1", 2, 12]), "inputs.0.shape.0: Input should be a valid integer"),
    "no shape": ({"name": "x", "datatype": "FP32", "data": [1]}, "inputs.0.shape: Field required"),
    "too few bytes": (entry("x", X, parameters={"binary_data_size": 92}), "input x has 92 bytes, and 96 are needed"),
    "bytes beyond the body": (entry("x", X, parameters={"binary_data_size": 999}), "of 999, and 96 bytes are left in the body"),
    "negative bytes": (entry("x", X, parameters={"binary_data_size": -4}), "binary_data_size: Input should be greater"),
    "neither data nor bytes": ({"name": "x", "datatype": "FP32", "shape": [1]}, "input x has neither data nor"),
    "both": (entry("x", X, data=[1.0]), "input x has both data and a binary_data_size"),
    "unknown datatype": (entry("x", X, datatype="BYTES"), "datatype 'BYTES'; the protocol's numbers are BOOL, FP16"),
    "ragged": ({"name": "x", "datatype": "FP32", "shape": [3], "data": [[1, 2], [3]]}, "input x: data is ragged or too deep"),
    "deep": ({"name": "x", "datatype": "FP32", "shape": [1], "data": NESTED}, "input x: data is ragged or too deep"),
    "text": (
        {"name": "x", "datatype": "FP32", "shape": [1], "data": ["1.5"]}, "input x: its data hold text; give numbers, true"
    ),
    # Every number as text of that length would be 40 TB.
    "long text among numbers": (
        {"name": "x", "datatype": "FP32", "shape": [10**5 + 1], "data": [*[1] * 10**5, "a" * 10**8]}, "its data hold text"
    ),
    "null": ({"name": "x", "datatype": "FP32", "shape": [1], "data": [None]}, "input x: its data hold null"),
    "too large an integer": (
        {"name": "mask", "datatype": "UINT8", "shape": [2], "data": [1, 256]}, "mask holds 1 to 256, and uint8 holds 0 to 255"
    ),
    "too small an integer": (
        {"name": "mask", "datatype": "UINT8", "shape": [2], "data": [1, -1]}, "mask holds -1 to 1, and uint8 holds 0 to 255"
    ),
    "booleans as numbers": ({"name": "x", "datatype": "FP32", "shape": [1], "data": [True]}, "input x: its data are bool"),
    "numbers as booleans": ({"name": "mask", "datatype": "BOOL", "shape": [1], "data": [1]}, "input mask: its data are int64"),
    "too few values": ({"name": "x", "datatype": "FP32", "shape": [3], "data": [1, 2]}, "x has 2 values, and 3 are needed"),
    "too large a value": ({"name": "x", "datatype": "FP32", "shape": [1], "data": [1e39]}, "holds 1e[+]39, more than float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", REST_REFUSALS)
def test_a_rest_tensor_that_does_not_add_up_is_refused_by_name(case: str) -> None:
    tensor, message = REST_REFUSALS[case]
    with pytest.raises(InputError, match=message):
        rest(tensor, binary=X.tobytes())


def test_an_empty_tensor_of_an_impossible_size_is_refused() -> None:
    with pytest.raises(InputError, match="is larger than any array"):
        rest({"name": "x", "datatype": "FP32", "shape": [0, *[2**31 - 1] * 7], "parameters": {"binary_data_size": 0}})


@pytest.mark.parametrize(("text", "message"), [
    (b"{", "the request is not JSON"), (b"", "the request is not JSON"), (b"[]", "the request's body: "),
    (b"{}", "the request's inputs: Field required"), (b"[" * 100_000, "the request is not JSON"),
    (b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}", "the request is not JSON: "), (b"\xff\xfe", "the request is not JSON"),
])  # fmt: skip
def test_a_body_that_is_not_the_protocols_json_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        protocol_rest.from_rest(text, None)


@pytest.mark.parametrize("length", ["-1", "9999", "1e3", "", "०", "9" * 50, "+5"])
def test_a_header_length_that_is_no_length_of_this_body_is_refused(length: str) -> None:
    with pytest.raises(InputError, match="Inference-Header-Content-Length is "):
        protocol_rest.from_rest(b"{}", length)


def test_inputs_and_outputs_given_twice_are_refused() -> None:
    with pytest.raises(InputError, match="input x is given twice"):
        rest(entry("x", X), entry("x", X), binary=X.tobytes() * 2)
    with pytest.raises(InputError, match="output out is asked for twice"):
        rest(entry("x", X), binary=X.tobytes(), outputs=[{"name": "out"}, {"name": "out"}])
    message = grpc("x", "FP32", [1], b"\0\0\0\0")
    message.inputs.append(message.inputs[0])
    with pytest.raises(InputError, match="1 raw_input_contents for 2 inputs"):
        protocol.from_grpc(message)
    message.raw_input_contents.append(b"\0\0\0\0")
    with pytest.raises(InputError, match="input x is given twice"):
        protocol.from_grpc(message)


def test_shared_memory_is_refused_instead_of_being_passed_over() -> None:
    region = {"shared_memory_region": "r", "shared_memory_byte_size": 96}
    with pytest.raises(
        InputError, match="x is in shared memory, which this server does not use; send it, and take it, as bytes"
    ):
        rest(entry("x", X, parameters=region), binary=X.tobytes())
    with pytest.raises(InputError, match="out is in shared memory"):
        rest(entry("x", X), binary=X.tobytes(), outputs=[{"name": "out", "parameters": region}])
    message = grpc("x", "FP32", [1], b"\0\0\0\0")
    message.outputs.add(name="out").parameters["shared_memory_region"].string_param = "r"
    with pytest.raises(InputError, match="out is in shared memory"):
        protocol.from_grpc(message)
    del message.outputs[:]
    message.inputs[0].parameters["shared_memory_region"].string_param = "r"
    with pytest.raises(InputError, match="x is in shared memory"):
        protocol.from_grpc(message)


def test_bytes_after_the_last_tensor_are_refused() -> None:
    with pytest.raises(InputError, match="5 bytes are left over after the last binary tensor"):
        rest(entry("x", X), binary=X.tobytes() + b"extra")


def test_bytes_and_values_at_once_are_refused() -> None:
    message = pb.ModelInferRequest(model_name="bca", raw_input_contents=[X.tobytes()])
    tensor = message.inputs.add(name="x", datatype="FP32", shape=X.shape)
    tensor.contents.fp32_contents.append(1.0)
    with pytest.raises(InputError, match="input x has contents, and the request raw_input_contents; give one of them"):
        protocol.from_grpc(message)


def test_half_precision_does_not_travel_as_values() -> None:
    with pytest.raises(InputError, match="input x is FP16, which travels as raw_input_contents alone"):
        protocol.from_grpc(grpc("x", "FP16", [1]))


def test_an_output_that_the_model_does_not_give_is_refused() -> None:
    request = protocol.Request({}, {"context_ou": True})
    with pytest.raises(InputError, match=r"no output 'context_ou' \(did you mean 'context_out'\?\); it gives out, context_out"):
        protocol.wanted(request, {"out": X, "context_out": X})


def test_an_answer_holds_what_was_asked_for_in_the_form_that_was_asked_for() -> None:
    request = protocol.Request({}, {"out": True, "context_out": False}, id="3")
    body, length = protocol_rest.to_rest(protocol.wanted(request, {"out": X, "context_out": X[..., :2], "attn": X}), "m")
    head = orjson.loads(body[:length])
    assert (head["id"], head["model_name"]) == ("3", "m")
    assert [(o["name"], o["datatype"], o["shape"]) for o in head["outputs"]] == [
        ("out", "FP32", [1, 2, 12]),
        ("context_out", "FP32", [1, 2, 2]),
    ]
    assert head["outputs"][0]["parameters"] == {"binary_data_size": X.nbytes}
    assert body[length:] == X.tobytes()
    assert head["outputs"][1]["data"] == X[..., :2].reshape(-1).tolist()


def test_half_precision_is_not_put_into_json() -> None:
    with pytest.raises(InputError, match="output out is float16, which JSON cannot hold; ask for it as binary_data"):
        protocol_rest.to_rest(protocol.Answer(protocol.Request({}, binary=False), {"out": X.astype(np.float16)}), "m")


def test_numbers_that_are_not_finite_are_null_in_json() -> None:
    answer = protocol.Answer(protocol.Request({}, binary=False), {"out": np.array([1.5, np.nan, np.inf], np.float32)})
    assert json.loads(protocol_rest.to_rest(answer, "m")[0])["outputs"][0]["data"] == [1.5, None, None]


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=300), st.none() | st.text(max_size=6))
def test_no_body_makes_anything_but_a_request_or_a_refusal(body: bytes, length: str | None) -> None:
    with contextlib.suppress(InputError):
        protocol_rest.from_rest(body, length)
