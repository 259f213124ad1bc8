"""The strict evaluator rounds where the graph says so, and nowhere else."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bca_deploy.parity.strict_evaluator import strict_runner

KINDS = {np.dtype(np.float16): TensorProto.FLOAT16, np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16}


def one_node(op: str, inputs: dict[str, np.ndarray], initializers: dict[str, np.ndarray] | None = None, **attributes: object):  # type: ignore[no-untyped-def]
    kind = KINDS[next(iter(inputs.values())).dtype]
    names = [*inputs, *(initializers or {})]
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], **attributes)],
        "one",
        [helper.make_tensor_value_info(name, kind, None) for name in inputs],
        [helper.make_tensor_value_info("y", kind, None)],
        [onnx.numpy_helper.from_array(a, name) for name, a in (initializers or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    return strict_runner(model)(inputs)["y"]


def test_layer_norm_in_float16_survives_activations_of_1e4() -> None:
    """Squares of 1e4 overflow float16; stash_type 1, the default, says to normalise in float32."""
    x = (np.random.default_rng(0).standard_normal((2, 64)) * 1e4).astype(np.float16)
    ones = np.ones(64, np.float16)
    got = one_node("LayerNormalization", {"x": x}, {"scale": ones, "bias": np.zeros(64, np.float16)})
    wide = x.astype(np.float64)
    wanted = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, wanted, atol=2e-3)


def test_layer_norm_without_the_stash_overflows_as_it_would_on_a_gpu() -> None:
    x = (np.random.default_rng(0).standard_normal((2, 64)) * 1e4).astype(np.float16)
    with np.errstate(all="ignore"):
        got = one_node("LayerNormalization", {"x": x}, {"scale": np.ones(64, np.float16)}, stash_type=0)
    wide = x.astype(np.float64)
    wanted = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    assert not np.allclose(got, wanted, atol=2e-3)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_matmul_accumulates_in_float32_and_rounds_once(dtype: type) -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((3, 4096), (4096, 5)))
    got = one_node("MatMul", {"a": a, "b": b})
    wanted = (a.astype(np.float64) @ b.astype(np.float64)).astype(dtype)
    unit = float(ml_dtypes.finfo(dtype).eps)
    assert got.dtype == np.dtype(dtype)
    np.testing.assert_allclose(got.astype(np.float64), wanted.astype(np.float64), rtol=unit, atol=unit * 4)


def test_a_float16_sum_that_leaves_the_range_is_infinite() -> None:
    got = one_node("ReduceSum", {"x": np.full((1, 2048), 100, np.float16)}, {"axes": np.array([1])}, keepdims=0)
    assert np.isinf(got).all()


def test_softmax_of_a_long_bfloat16_row_sums_to_one() -> None:
    """A sum that is rounded at every step stops at 256 in bfloat16."""
    got = one_node("Softmax", {"x": np.zeros((1, 4096), ml_dtypes.bfloat16)})
    np.testing.assert_allclose(got.astype(np.float64).sum(), 1.0, rtol=1e-2)


def test_a_sigmoid_is_rounded_once() -> None:
    x = np.linspace(-10, 10, 2001).astype(np.float16)
    got = one_node("Sigmoid", {"x": x})
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float16))
