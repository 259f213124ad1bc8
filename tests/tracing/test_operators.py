"""Operators of PyTorch that the exporter has no ONNX form for: ours is PyTorch's, bit for bit, at every size and type."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from bca_deploy.signature import DimRange, Dims
from bca_deploy.tracing.graph import Traceable, convert

Op = Callable[[Tensor, Tensor], Any]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# The smallest (one, none), odd, even, unequal.
SIZES = [(1, 1), (1, 0), (0, 4), (3, 5), (4, 6), (2, 17)]

TABLE = [-1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.5]
WIDE = 1 + 1e-12  # float64 alone can tell it from 1


def table(dtype: torch.dtype) -> Tensor:
    return torch.tensor(TABLE).to(dtype)


def cases() -> dict[str, Op]:
    """Of x [b, n], floats with ties and NaN, and i [b, n], small integers, what is tried."""
    return {**running(), **members(), **places(), **truths()}


def running() -> dict[str, Op]:
    found: dict[str, Op] = {
        "cummax of the last axis": lambda x, i: torch.cummax(x, -1),
        "cummin of the first axis": lambda x, i: torch.cummin(x, 0),
        "cummax of a middle axis": lambda x, i: torch.cummax(torch.stack([x, -x], 2), 1),
        "cummin of a middle axis": lambda x, i: torch.cummin(torch.stack([x, -x], 2), -2),
        "cummax of one number": lambda x, i: torch.cummax(i.sum(), 0),
        "cummin of one number": lambda x, i: torch.cummin(i.sum(), -1),
    }
    for dtype in (*FLOATS, *INTEGERS):
        found[f"cummax {dtype}"] = partial(of_type, torch.cummax, dtype, 0)
        found[f"cummin {dtype}"] = partial(of_type, torch.cummin, dtype, -1)
    return found


def of_type(of: Any, dtype: torch.dtype, axis: int, x: Tensor, i: Tensor) -> Any:
    return of((x if dtype.is_floating_point else i).to(dtype), axis)


def members() -> dict[str, Op]:
    return {
        "isin": lambda x, i: torch.isin(x, table(x.dtype)),
        "isin, inverted": lambda x, i: torch.isin(x, table(x.dtype), invert=True),
        "isin, unique": lambda x, i: torch.isin(torch.arange(x.shape[1]), torch.tensor([1, 4]), assume_unique=True),
        "isin of a square": lambda x, i: torch.isin(i, table(i.dtype)[:6].reshape(2, 3), assume_unique=False),
        "isin of another type": lambda x, i: torch.isin(i, torch.tensor([0.5, 1.0, 2.0])),
        "isin of small integers": lambda x, i: torch.isin(i.to(torch.int8), table(torch.int64)),
        "isin of nothing": lambda x, i: torch.isin(x, table(x.dtype)[:0]),
        "isin of NaN": lambda x, i: torch.isin(x, torch.tensor([torch.nan, 1.0])),
        "isin of its own": lambda x, i: torch.isin(x, x[:1]),
        "isin of one": lambda x, i: torch.isin(x, 1),
        "one in": lambda x, i: torch.isin(1, i),
        "a fraction in": lambda x, i: torch.isin(0.5, i, invert=True),
        "a half in": lambda x, i: torch.isin(0.5, x),
    }


def places() -> dict[str, Op]:
    def rows(x: Tensor) -> Tensor:
        return torch.cat([x.nan_to_num(0.5), x.nan_to_num(2.0)], 1)

    found: dict[str, Op] = {
        "searchsorted in rows": lambda x, i: torch.searchsorted(rows(x).sort(1)[0], x),
        "searchsorted in rows, right": lambda x, i: torch.searchsorted(rows(x).sort(1)[0], x, right=True),
        "searchsorted by a sorter": lambda x, i: torch.searchsorted(rows(x), x, side="right", sorter=rows(x).argsort(1)),
        "searchsorted in nothing": lambda x, i: torch.searchsorted(table(x.dtype)[:0], x),
        "searchsorted, int32": lambda x, i: torch.searchsorted(table(x.dtype), x, out_int32=True),
        "searchsorted of another type": lambda x, i: torch.searchsorted(table(torch.int64), x),
        "searchsorted of a number": lambda x, i: torch.searchsorted(table(x.dtype), 0.5) + x.shape[0],
        "searchsorted of a wide number": lambda x, i: torch.searchsorted(x.nan_to_num(1.0).double().flatten().sort()[0], WIDE),
        "searchsorted of a tensor without axes": lambda x, i: torch.searchsorted(table(torch.int64), i.sum()),
        "searchsorted of integers by a fraction": lambda x, i: torch.searchsorted(i.flatten().sort()[0], 0.5, right=True),
    }
    for dtype in (*FLOATS, *INTEGERS[1:]):
        for side in ("left", "right"):
            found[f"searchsorted {dtype} {side}"] = partial(sided, dtype, side)
    return found


def sided(dtype: torch.dtype, side: str, x: Tensor, i: Tensor) -> Tensor:
    given, sorted_ = (x, table(torch.float32)) if dtype.is_floating_point else (i, torch.tensor([0, 1, 1, 3]))
    return torch.searchsorted(sorted_.to(dtype), given.to(dtype), side=side)


def truths() -> dict[str, Op]:
    return {
        "all true": lambda x, i: torch._is_all_true(i > -1),
        "not all true": lambda x, i: torch._is_all_true(x > 0),
        "all true of one": lambda x, i: torch._is_all_true(i.sum() > 3),
    }


CASES = cases()


class Ops(nn.Module):
    """All of them, so that they share an export; numpy has no bfloat16."""

    def forward(self, x: Tensor, i: Tensor) -> dict[str, Tensor]:
        found = {name: of(x, i) for name, of in CASES.items()}
        each = {f"{name}, {at}": t for name, of in found.items() for at, t in enumerate(of if isinstance(of, tuple) else [of])}
        return {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in each.items()}


def parts(x: np.ndarray, i: np.ndarray) -> dict[str, np.ndarray]:
    return {name: t.numpy() for name, t in Ops()(torch.from_numpy(x), torch.from_numpy(i)).items()}


@pytest.fixture(
    scope="module", params=[17, *(pytest.param(opset, marks=pytest.mark.slow) for opset in (18, 21, 25))], ids="opset {}".format
)
def run(request: pytest.FixtureRequest) -> Callable[..., dict[str, np.ndarray]]:
    sizes = DimRange(1, 4, 20)
    inputs = {"x": torch.randn(3, 5), "i": torch.ones(3, 5, dtype=torch.long)}
    axes = dict.fromkeys(inputs, ("batch", "n"))
    names = Ops()(**inputs)
    dims = Dims({"batch": sizes, "n": sizes})
    numbered = tuple(f"out_{number}" for number in range(len(names)))
    model, _ = convert(Traceable(Ops().eval(), inputs, axes, dims, numbered), request.param)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": request.param}
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda x, i: dict(zip(names, session.run(None, {"x": x, "i": i}), strict=True))


def drawn(size: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Few different numbers, so that many are equal; every sixth is NaN, and some are infinite."""
    rng = np.random.default_rng([seed, *size])
    x = rng.choice([-np.inf, -1, 0, 0.5, 1, 2.5, 3, np.inf], size=size).astype(np.float32)
    x[rng.random(size) < 1 / 6] = np.nan
    return x, rng.integers(0, 4, size)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_operator_without_a_form_is_pytorchs(
    run: Callable[..., dict[str, np.ndarray]], size: tuple[int, int], seed: int
) -> None:
    inputs = drawn(size, seed)
    got, wanted = run(*inputs), parts(*inputs)
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name], strict=True, err_msg=name)


@pytest.mark.parametrize("number", [np.nan, 2.0, -np.inf])
def test_of_equal_ones_and_of_nan_the_last_so_far_stands(run: Callable[..., dict[str, np.ndarray]], number: float) -> None:
    outputs = run(np.full((2, 7), number, dtype=np.float32), np.ones((2, 7), np.int64))
    np.testing.assert_array_equal(outputs["cummax of the last axis, 1"], [range(7)] * 2)
