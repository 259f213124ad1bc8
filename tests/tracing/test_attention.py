"""A model's other attention: PyTorch's function, with zeros where a mask leaves no key, in the graph as well."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bca_deploy.signature import DimRange, Dims
from bca_deploy.tracing.attention import ZerosWithoutKeys
from bca_deploy.tracing.graph import Traceable, convert, write
from bca_deploy.whole.samples import rooted


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 2, n, 8, generator=generator).to(dtype) for n in (4, 5, 5))  # type: ignore[return-value]


def mask() -> Tensor:
    found = torch.rand(3, 1, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    found[0] = False
    found[1, :, :, 0] = True
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("additive", [False, True])
def test_it_is_pytorch_s_function_and_gives_zeros_where_no_key_is_left(
    dtype: torch.dtype, scale: float | None, additive: bool
) -> None:
    q, k, v = tensors(dtype)
    given = torch.where(mask(), 0.0, -torch.inf).to(dtype) if additive else mask()
    wanted = functional.scaled_dot_product_attention(q, k, v, given, scale=scale)
    with ZerosWithoutKeys():
        got = functional.scaled_dot_product_attention(q, k, v, given, scale=scale)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
    assert not got[0].any()


def test_a_finite_bias_is_added() -> None:
    q, k, v = tensors()
    bias = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2))
    with ZerosWithoutKeys():
        got = functional.scaled_dot_product_attention(q, k, v, bias)
    torch.testing.assert_close(got, functional.scaled_dot_product_attention(q, k, v, bias), atol=1e-6, rtol=0)


def test_the_lowest_number_in_a_mask_is_a_number() -> None:
    q, k, v = tensors()
    given = torch.where(mask(), 0.0, torch.finfo(torch.float32).min)
    with ZerosWithoutKeys():
        got = functional.scaled_dot_product_attention(q, k, v, given)
    torch.testing.assert_close(got, functional.scaled_dot_product_attention(q, k, v, given), atol=1e-6, rtol=0)
    assert got[0].any()


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_an_encoder_of_pytorch_gives_finite_numbers_for_an_item_that_is_all_padding(
    heads: int, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    attention = nn.MultiheadAttention(12, heads, batch_first=True).eval()
    x, padding = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0)), ~mask()[:, 0, 1]
    padding[0] = True
    wanted, _ = attention(x, x, x, key_padding_mask=padding, need_weights=False)  # with gradients: its slow path
    with ZerosWithoutKeys(), mode():
        got, _ = attention(x, x, x, key_padding_mask=padding, need_weights=False)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_attention_without_a_mask_runs_as_it_is(options: dict[str, bool]) -> None:
    q, k, v = tensors()
    with ZerosWithoutKeys():
        got = functional.scaled_dot_product_attention(q, k, v, **options)
    assert torch.equal(got, functional.scaled_dot_product_attention(q, k, v, **options))


class Encoder(nn.Module):
    def forward(self, x: Tensor, live: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x, live[:, None, :])


def test_the_graph_gives_zeros_for_an_item_that_is_all_padding(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)), "live": mask()[:, 0, 1]}
    inputs["live"][0] = False
    axes = {"x": ("batch", "length", 8), "live": ("batch", "length")}
    dims = Dims(batch=DimRange(1, 3, 8), length=DimRange(1, 5, 9))
    root = rooted(Encoder(), ["x", "live"], {}, torch.float32, torch.float32)
    model, _ = convert(Traceable(root, inputs, axes, dims, ("output",)), 17)
    write(model, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    np.testing.assert_allclose(got, Encoder()(**inputs).numpy(), atol=1e-6)
    assert not got[0].any()
