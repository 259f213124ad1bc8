"""Attention between a long sequence and a short one, with the long side's projections moved to the short side. Exact.

With N rows of ``x``, M of ``context`` and heads as wide as ``x``, each of N rows' projections is as large as an attention map.
In exact arithmetic ``(x Wq_h + bq_h) . k_h = x . (Wq_h k_h) + bq_h . k_h``: the queries are ``x`` itself, shared by all heads,
and keys ``[M, D]`` take the projection; the values' projection, and that of the output, move in the same way.

    x <- context:  sum_h softmax(x K'_h^T + c_h) V'_h + bo,  K'_h = s k_h Wq_h,  c_h = s k_h . bq_h,  V'_h = v_h Wo_h
    context <- x:  (softmax(K'_h x^T) x) Wv_h + bv_h,        as rows of a softmax sum to 1, and c_h is constant along them
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from bca_deploy.layers.lowered_attention import Extras, Linear
from bca_deploy.spec import AbsorbedForm, LayerSpec, Runtime

#: TensorRT-RTX 1.7.1, fp16, x of 5,000 and 22,223 rows: flat has the least scratch memory up to 128 rows of context, and at 256
#: twice that of loopq in a batch of 4. On the CPU it is the fastest, or within 4 % of it (docs/models.md).
FLAT_UP_TO = 128


class AbsorbedAttention(nn.Module):
    """The layer with absorbed projections, in one of three forms.

    Args:
        spec: of a family that has them.
        form: ``flat`` forms one product for all heads; ``loopq`` attends to each head in turn, and asks for all heads' rows of
            ``context`` at once; ``expand`` has ``x`` once for every head.
        dtype: of weights and activations.
    """

    def __init__(self, spec: LayerSpec, form: AbsorbedForm, dtype: torch.dtype) -> None:
        super().__init__()
        heads, size = spec.heads, spec.dim_head
        self.form, self.heads, self.scale, self.dtype = form, heads, spec.scale, dtype
        self.context_to_qk = Linear(spec.context_dim, spec.inner_dim, bias=True)
        self.context_to_v = Linear(spec.context_dim, spec.inner_dim, bias=True)
        self.context_to_out = Linear(spec.inner_dim, spec.context_dim, bias=True)
        self.to_qk = _Heads((heads, size, spec.dim), (heads, size, 1))
        self.to_v = _Heads((heads, spec.dim, size), (heads, 1, size))
        self.to_out = _Heads((heads, size, spec.dim), (spec.dim,))

    def forward(self, x: Tensor, context: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
        """Return ``out [B, N, D]`` and ``context_out [B, M, C]``."""
        mask, context_mask, _ = extras
        k = self._split(self.context_to_qk(context)) * self.scale
        keys, shift = k @ self.to_qk.weight, (k @ self.to_qk.bias).transpose(-1, -2)  # [B, H, M, D], [B, H, 1, M]
        values = self._split(self.context_to_v(context)) @ self.to_out.weight  # [B, H, M, D]
        if context_mask is not None:
            shift = torch.where(context_mask[:, None, None, :], shift, self._lowest())
        out = self._to_x(x, keys, shift, values) + self.to_out.bias
        heard = self._to_context(x, keys, mask)  # [B, H, M, D]
        return out, self.context_to_out(_merge(heard @ self.to_v.weight + self.to_v.bias))

    def _to_x(self, x: Tensor, keys: Tensor, shift: Tensor, values: Tensor) -> Tensor:
        if self.form == "flat":
            sim = x @ keys.flatten(1, 2).transpose(-1, -2)
            sim = sim.reshape(*x.shape[:2], self.heads, -1)  # [B, N, H, M]
            return (sim + shift.transpose(1, 2)).softmax(-1).flatten(2) @ values.flatten(1, 2)
        if self.form == "expand":
            sim = x[:, None].expand(-1, self.heads, -1, -1) @ keys.transpose(-1, -2) + shift
            return (sim.softmax(-1) @ values).sum(1)
        out = None
        for head in range(self.heads):
            one = slice(head, head + 1)
            sim = x[:, None] @ keys[:, one].transpose(-1, -2) + shift[:, one]
            heard = sim.softmax(-1) @ values[:, one]
            out = heard if out is None else out + heard
        return cast(Tensor, out)[:, 0]

    def _to_context(self, x: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        rows = x[:, None].expand(-1, self.heads, -1, -1) if self.form == "expand" else x[:, None]
        asking = keys.flatten(1, 2)[:, None] if self.form == "loopq" else keys
        sim = asking @ rows.transpose(-1, -2)
        if mask is not None:
            sim = sim + torch.where(mask, torch.zeros((), dtype=self.dtype), self._lowest())[:, None, None, :]
        heard = sim.softmax(-1) @ rows
        return heard.reshape(*keys.shape) if self.form == "loopq" else heard

    def _split(self, t: Tensor) -> Tensor:
        return t.reshape(*t.shape[:2], self.heads, -1).transpose(1, 2)

    def _lowest(self) -> Tensor:
        return torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype)


class _Heads(nn.Module):
    """A projection kept head by head."""

    def __init__(self, weight: tuple[int, ...], bias: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(weight)), nn.Parameter(torch.empty(bias))


def _merge(t: Tensor) -> Tensor:
    return t.transpose(1, 2).flatten(-2)


def absorbed_state(spec: LayerSpec, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights as :class:`AbsorbedAttention` holds them."""
    heads, size = spec.heads, spec.dim_head
    shapes = {"to_qk.bias": (heads, size, 1), "to_v.bias": (heads, 1, size), "to_qk.weight": (heads, size, spec.dim)}
    held = {name: tensor.reshape(shapes[name]) for name, tensor in state.items() if name in shapes}
    held["to_v.weight"] = state["to_v.weight"].reshape(heads, size, spec.dim).transpose(1, 2)
    held["to_out.weight"] = state["to_out.weight"].t().reshape(heads, size, spec.dim)
    rest = {name: tensor.t() if tensor.ndim > 1 else tensor for name, tensor in state.items() if name not in held}
    return {name: tensor.to(dtype).contiguous() for name, tensor in (rest | held).items()}


def absorbed_form(runtime: Runtime, context_len: int) -> AbsorbedForm:
    """Return the form for a graph, by the rule that benchmarks/absorbed.py derives.

    Args:
        runtime: what runs it.
        context_len: the most rows of ``context``.
    """
    return "flat" if runtime == "onnxruntime-cpu" or context_len <= FLAT_UP_TO else "loopq"
