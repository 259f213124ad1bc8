"""PyTorch's own attention of a model's other parts, written so that every runtime gives zeros where no key is left.

PyTorch gives zeros to a query that its mask leaves no key, in an item that is all padding. torch.onnx adds -inf, takes the
softmax and puts zeros in place of NaN; onnxruntime 1.32 on CPU has numbers there, and no NaN.
"""

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class ZerosWithoutKeys(TorchFunctionMode):
    """While this is on, scaled_dot_product_attention with a mask is written out; everything else runs as it is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the one function."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and _is_plain(*args, **kwargs):
            return _attention(*args, **kwargs)
        if func is functional.multi_head_attention_forward:  # calls it, where this would be off
            with self:
                return _multi_head_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _undispatched(func: Any) -> Callable[..., Any]:
    """Return a function of torch.nn.functional as it is, but for asking modes first whether they take its place."""
    names = {**func.__globals__, "has_torch_function": lambda tensors: False}
    return FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)


_multi_head_attention = _undispatched(functional.multi_head_attention_forward)


def _is_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> bool:
    return attn_mask is not None and not is_causal and not dropout_p and not kwargs.get("enable_gqa")


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, *args: Any, scale: float | None = None, **kwargs: Any
) -> Tensor:
    """As https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html says."""
    lowest = torch.finfo(query.dtype).min
    sim = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if attn_mask.dtype == torch.bool:
        live, sim = attn_mask, sim.masked_fill(~attn_mask, lowest)
    else:
        live, sim = attn_mask > -torch.inf, sim + attn_mask.clamp(min=lowest).to(sim.dtype)
    attended = sim.softmax(-1) @ value
    return torch.where(live.any(-1, keepdim=True), attended, torch.zeros((), dtype=attended.dtype))
