"""The layer's relatives written the way compilers like them: LightGlue's block, and GroundingDINO's absorbed projections.

Requires: a specification of a relative and its weights under the seed's names. Ensures: equal to the reference in
layers/relatives.py at every row that it defines; called as the other cores are, ``[batch, length, features]`` throughout.
"""

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor, nn

from bca_deploy.errors import LoweringError
from bca_deploy.layers.absorbed import AbsorbedAttention, absorbed_state
from bca_deploy.layers.lowered_attention import (
    Attention,
    CpuAttention,
    Extras,
    FusedAttention,
    Linear,
    MaskedCpuAttention,
    Norm,
    live_rows,
)
from bca_deploy.spec import AbsorbedForm, LayerSpec, Lowering, Runtime

_State = Mapping[str, Tensor]
_FEED_FORWARD = "ff."


class BatchFirst(FusedAttention):
    """Two ordinary attentions with zeros at dead rows. TensorRT-RTX needs less scratch memory for it with the batch first."""

    sequence_first = False

    def split(self, t: Tensor) -> Tensor:
        """From ``[B, N, H * D]`` to ``[B, H, N, D]``."""
        return t.reshape(*t.shape[:2], self.heads, -1).transpose(1, 2)

    def merge(self, t: Tensor) -> Tensor:
        """From ``[B, H, N, D]`` to ``[B, N, H * D]``."""
        return t.transpose(1, 2).flatten(-2)

    def rows(self, mask: Tensor) -> Tensor:
        """From ``[B, N]`` to ``[B, N, 1]``."""
        return mask[..., None]

    def dead(self, v: Tensor) -> Tensor:
        """Return zero."""
        return torch.zeros((), dtype=v.dtype)


class ZerosCpu(MaskedCpuAttention):
    """The form for onnxruntime on CPU, with zeros at dead rows."""

    def settled(self, out: Tensor, context_out: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
        """Return both with zeros at dead rows."""
        mask, context_mask, _ = extras
        return _zeroed(out, live_rows(mask, context_mask)), _zeroed(context_out, live_rows(context_mask, mask))


def _zeroed(out: Tensor, live: Tensor | None) -> Tensor:
    return out if live is None else torch.where(live[:, 0], out, torch.zeros((), dtype=out.dtype))


class Block(nn.Module):
    """An attention whose message goes through a feed-forward, beside the sequence that it is for, and is added to it."""

    def __init__(self, spec: LayerSpec, attention: Attention, dtype: torch.dtype) -> None:
        super().__init__()
        wide, hidden = 2 * spec.dim, spec.ff_hidden or 0
        self.attention = attention
        norm = Norm(spec, hidden, dtype)
        self.ff = nn.Sequential(Linear(wide, hidden, bias=True), norm, nn.GELU(), Linear(hidden, spec.dim, bias=True))

    def forward(self, x: Tensor, context: Tensor, extras: Extras) -> tuple[Tensor, ...]:
        """Return both sequences with what they heard of each other."""
        message, context_message, *_ = self.attention(x, context, extras)
        return self._added(x, message), self._added(context, context_message)

    def _added(self, x: Tensor, message: Tensor) -> Tensor:
        added: Tensor = x + self.ff(torch.cat([x, message], -1))
        return added


def lower_relative(
    spec: LayerSpec, state: _State, lowering: Lowering, dtype: torch.dtype, runtime: Runtime, masked: bool
) -> nn.Module:
    """Return the core of a relative's lowered form, with its weights.

    Args:
        spec: of a relative.
        state: its weights under the seed's names.
        lowering: ``fused``, or a form of absorbed projections where the family has them.
        dtype: of weights and activations; norms are float32.
        runtime: ``onnxruntime-cpu`` takes that runtime's own attention operator, but for absorbed projections.
        masked: whether it is ever given a mask.

    Raises:
        LoweringError: the family has no such form.
    """
    absorbed = next((form for form in get_args(AbsorbedForm) if form == lowering), None)
    if (absorbed is not None) != spec.kin.absorbed or lowering == "reference":
        allowed = ", ".join(get_args(AbsorbedForm)) if spec.kin.absorbed else "fused"
        raise LoweringError(f"{spec.kin.title} has no form {lowering!r}; allowed: {allowed}, or keep the layer literal")
    if absorbed is not None:
        with torch.device("meta"):
            core = AbsorbedAttention(spec, absorbed, dtype)
        core.load_state_dict(absorbed_state(spec, state, dtype), assign=True)
        return core
    return _block(spec, state, dtype, _kind(runtime, masked))


def _kind(runtime: Runtime, masked: bool) -> type[Attention]:
    if runtime == "onnxruntime-cpu":
        return ZerosCpu if masked else CpuAttention
    return BatchFirst


def _block(spec: LayerSpec, state: _State, dtype: torch.dtype, kind: type[Attention]) -> Block:
    with torch.device("meta"):
        block = Block(spec, kind(spec, dtype), dtype)
    block.load_state_dict(
        {_name(name): _held(name, tensor, spec, dtype, kind.features) for name, tensor in state.items()}, assign=True
    )
    for shared in spec.kin.projections.values():  # once in the file
        for other in shared[1:]:
            setattr(block.attention, other, getattr(block.attention, shared[0]))
    return block


def _name(name: str) -> str:
    return name if name.startswith(_FEED_FORWARD) else f"attention.{name}"


def _held(name: str, tensor: Tensor, spec: LayerSpec, dtype: torch.dtype, more: int) -> Tensor:
    """Return a weight as the graph holds it: matrices as ``[in, out]``, norms in float32, heads with so many more features."""
    if name.startswith("ff.1."):
        return tensor.float()
    turned = tensor.t() if tensor.ndim > 1 else tensor
    if not name.split(".", maxsplit=1)[0].endswith("to_qk"):
        return turned.to(dtype).contiguous()
    heads = turned.to(dtype).reshape(*turned.shape[:-1], spec.heads, -1)
    return torch.cat([heads, heads.new_zeros(*heads.shape[:-1], more)], -1).flatten(-2)
