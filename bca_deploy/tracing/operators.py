"""Operators of PyTorch that torch's exporter has no ONNX form for, written in operators of opset 18 that 17 has a form of.

Each is PyTorch's at every size, 0 too, and in every element type that PyTorch has it for; so are ties, and NaN. All of them
compare every element with every other, which suits the words of a text and the rows of a table, not the samples of a sound.
"""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype, to_torch_dtype
from onnxscript import opset18

# Values of a graph in the making: the operators are annotated for arrays, and the exporter, which reads these, for its own.
_Value = Any
op: Any = opset18

# In which type elements are compared: runtimes, onnxruntime on the CPU for one, do it in few. None of these rounds.
_COMPARED = {
    torch.bool: torch.int32,
    torch.uint8: torch.int32,
    torch.int8: torch.int32,
    torch.int16: torch.int32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}


def forms() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what torch.onnx.export takes as its ``custom_translation_table``: for each operator, what builds its form."""
    aten = torch.ops.aten
    return {
        aten._is_all_true.default: _is_all_true,
        aten.cummax.default: _cummax,
        aten.cummin.default: _cummin,
        aten.isin.Scalar_Tensor: _isin,  # torch's own way to take both apart sorts, and fails where there is nothing
        aten.isin.Tensor_Tensor: _isin,
        aten.searchsorted.Scalar: _searchsorted,
        aten.searchsorted.Tensor: _searchsorted,
    }


def _is_all_true(live: _Value) -> _Value:
    return op.Equal(_count(op.Reshape(op.Not(live), [-1])), 0)


def _cummax(x: _Value, dim: int) -> tuple[_Value, _Value]:
    return _running(op.GreaterOrEqual, x, dim)


def _cummin(x: _Value, dim: int) -> tuple[_Value, _Value]:
    return _running(op.LessOrEqual, x, dim)


def _running(keeps: Callable[..., Any], x: _Value, dim: int) -> tuple[_Value, _Value]:
    """Return the largest (or the smallest) element so far, and where it stands.

    A place leads if its element is not behind any before it: the last of equal ones, and of NaN. The last leader so far has it.
    """
    if not _rank(x):
        return op.Identity(x), op.Constant(value_int=0)
    axis, last = dim % _rank(x), _rank(x) - 1
    order = [{axis: last, last: axis}.get(each, each) for each in range(_rank(x))]
    rows = op.Transpose(_cast(x, _compared(_dtype(x))), perm=order)
    places = op.Range(0, op.Squeeze(op.Shape(rows, start=last)), 1)
    so_far = op.GreaterOrEqual(op.Unsqueeze(places, [-1]), places)
    ahead = keeps(op.Unsqueeze(rows, [-1]), op.Unsqueeze(rows, [-2]))
    if _dtype(x).is_floating_point:
        ahead = op.Or(ahead, op.Unsqueeze(op.IsNaN(rows), [-1]))
    leads = op.Equal(_count(op.And(op.Not(ahead), so_far)), 0)
    leaders = op.Where(op.And(op.Unsqueeze(leads, [-2]), so_far), places, 0)
    indices = op.Transpose(op.ReduceMax(leaders, [-1], keepdims=0), perm=order)
    return op.GatherElements(x, indices, axis=axis), indices


def _isin(elements: _Value, among: _Value, assume_unique: bool = False, invert: bool = False) -> _Value:
    common = _common(elements, among)
    equal = op.Equal(op.Unsqueeze(_cast(elements, common), [-1]), op.Reshape(_cast(among, common), [-1]))
    absent = op.Equal(_count(equal), 0)
    return absent if invert else op.Not(absent)


def _searchsorted(
    ascending: _Value,
    wanted: _Value,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: _Value | None = None,
) -> _Value:
    """Count what stands before each wanted value; all of it does before NaN. What holds NaN itself is not sorted."""
    common = _common(ascending, wanted)
    rows = ascending if sorter is None else op.GatherElements(ascending, sorter, axis=-1)
    rows = _cast(rows, common) if _rank(ascending) == 1 else op.Unsqueeze(_cast(rows, common), [-2])
    behind = op.Greater if right or side == "right" else op.GreaterOrEqual
    before = op.Not(behind(rows, op.Unsqueeze(_cast(wanted, common), [-1])))
    return _count(before, torch.int32 if out_int32 else torch.int64)


def _count(live: _Value, dtype: torch.dtype = torch.int64) -> _Value:
    """Return how many are true along the last axis: of none that is 0, where a largest is not defined."""
    return op.ReduceSum(_cast(live, dtype), [-1], keepdims=0)


# ---- types; what stands between operators has none yet


def _cast(value: _Value, dtype: torch.dtype) -> _Value:
    if not isinstance(value, ir.Value):
        return op.Constant(value=ir.tensor(torch.tensor(value, dtype=dtype).numpy()))
    return op.Cast(value, to=from_torch_dtype(dtype))


def _common(one: _Value, other: _Value) -> torch.dtype:
    """Return in what PyTorch compares them: a tensor without axes, or a number, widens none that has axes."""
    return _compared(torch.result_type(_like(one), _like(other)))


def _like(value: _Value) -> torch.Tensor | float:
    return torch.empty([1] * _rank(value), dtype=_dtype(value)) if isinstance(value, ir.Value) else value


def _compared(dtype: torch.dtype) -> torch.dtype:
    return _COMPARED.get(dtype, dtype)


def _rank(value: _Value) -> int:
    return len(value.shape)


def _dtype(value: _Value) -> torch.dtype:
    return to_torch_dtype(value.dtype)
