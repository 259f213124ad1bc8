"""The same function as the reference layer, written the way compilers like it, ready to be traced.

Requires: a checkpoint. Ensures: a module whose parameters carry the seed's names, matrices transposed to ``[in, out]`` so
that the graph holds them as they are; equal to the reference at live and at dead rows.

A row is dead where its own mask is false or no key is live; the reference gives it the mean over ALL values, padded ones
too, because its whole row is filled with one number before the softmax. A key mask alone cannot do that, so ``fused``
computes two ordinary attentions and selects the mean for dead rows afterwards.

Inside, activations are ``[length, batch, features]``: batch and heads then lie side by side in memory, and NVIDIA's attention
kernel reads the projections where they are instead of copying each into head order (TensorRT-RTX 1.7.1: 121 MB of scratch
memory instead of 147, at 8x2048x2048). On the CPU it makes little difference (within 4 %).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bca_deploy.checkpoint import Checkpoint, State
from bca_deploy.errors import LoweringError
from bca_deploy.spec import Interface, LayerSpec, Lowering, Precision, Runtime

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose(requested: Lowering | str, spec: LayerSpec, interface: Interface) -> Lowering:
    """Return the lowering to use.

    Args:
        requested: ``auto`` takes ``fused`` wherever it is possible.
        spec: the layer.
        interface: its optional inputs and outputs.

    Returns:
        ``reference`` or ``fused``.

    Raises:
        LoweringError: the request is impossible for this layer or interface, or unknown.
    """
    if interface.attention_maps and spec.depth is not None:
        raise LoweringError(
            "attention maps of a transformer: it returns none in PyTorch either; export one of its layers instead"
        )
    obstacle = _why_not_fused(spec, interface)
    if requested == "auto":
        return "reference" if obstacle else "fused"
    if requested == "fused" and obstacle:
        raise LoweringError(f"lowering 'fused' is impossible with {obstacle}; use lowering 'reference' or 'auto'")
    if requested not in ("reference", "fused"):
        raise LoweringError(f"lowering {requested!r} is not known; allowed: auto, reference, fused")
    return "fused" if requested == "fused" else "reference"


def _why_not_fused(spec: LayerSpec, interface: Interface) -> str | None:
    if spec.talking_heads:
        return "talking heads, which mix whole attention maps after the softmax"
    if interface.attention_maps:
        return "attention maps as outputs, which a fused attention never forms"
    return None


def lower(
    checkpoint: Checkpoint,
    lowering: Lowering,
    precision: Precision = "fp32",
    keep_io_types: bool = True,
    attention_maps: bool = False,
    runtime: Runtime = "portable",
) -> "LoweredModel":
    """Return the traceable module.

    Args:
        checkpoint: the layer and its weights.
        lowering: from :func:`choose`.
        precision: what weights and activations are rounded to; normalisation and the mean over values stay in float32.
        keep_io_types: float32 at the edges whatever the precision.
        attention_maps: return both attention maps as well; needs the ``reference`` lowering of a bare layer.
        runtime: ``onnxruntime-cpu`` takes that runtime's own attention operator; where :func:`has_cpu_form` says so.

    Returns:
        A module in eval mode; call it as the reference layer.

    Raises:
        LoweringError: attention maps from a form that has none.
    """
    if attention_maps and (lowering == "fused" or checkpoint.spec.depth is not None):
        raise LoweringError("attention maps exist only in the 'reference' lowering of a bare layer")
    dtype = DTYPES[precision]
    kind = _KINDS["onnxruntime-cpu" if runtime == "onnxruntime-cpu" else lowering]
    with torch.device("meta"):
        core = _build(checkpoint.spec, kind, dtype)
    core.load_state_dict(lowered_state(checkpoint.state, dtype), assign=True)
    edge = torch.float32 if keep_io_types else dtype
    # A prenorm layer reads its inputs through a norm alone, which works in float32 anyway.
    cast = checkpoint.spec.depth is not None or not checkpoint.spec.prenorm
    return LoweredModel(core, dtype if cast else None, edge, attention_maps, kind.sequence_first).eval()


def has_cpu_form(lowering: Lowering, precision: Precision, interface: Interface) -> bool:
    """Whether there is a second form of the model for onnxruntime on CPU: fused, float32, no bias."""
    return lowering == "fused" and precision == "fp32" and interface.rel_pos_bias == "none"


def lowered_state(state: State, dtype: torch.dtype) -> State:
    """Return the weights as the graph holds them: rounded to ``dtype``, matrices as ``[in, out]``, norms in float32."""
    rounded = {name: tensor.to(dtype) for name, tensor in state.items()}
    norms = {name for name in state if _is_norm(name)}
    return {
        name: tensor.float() if name in norms else tensor.t().contiguous() if tensor.ndim == 2 else tensor
        for name, tensor in rounded.items()
    }


def _is_norm(name: str) -> bool:
    owner = name.split(".")[:-1]
    return owner[-1] in ("norm", "context_norm") or (len(owner) == 4 and owner[-2] in ("1", "2") and owner[-1] == "0")


class _Linear(nn.Module):
    """``x @ weight + bias`` with the weight as ``[in, out]``, so that the graph needs no transpose."""

    def __init__(self, width_in: int, width_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_in, width_out))
        self.bias = nn.Parameter(torch.empty(width_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


class _Norm(nn.Module):
    """The spec's normalisation, in float32 whatever comes in: squares of half-precision activations overflow."""

    def __init__(self, spec: LayerSpec, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.eps, self.dim, self.dtype = spec.norm, spec.norm_eps, dim, dtype
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if spec.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.kind == "layer":
            return functional.layer_norm(wide, (self.dim,), self.weight, self.bias, self.eps).to(self.dtype)
        # Sum, not mean: the conversion of ReduceMean down to opset 17 fails without a word.
        root = ((wide * wide).sum(-1, keepdim=True) / self.dim + self.eps).sqrt()
        return (wide / root * self.weight).to(self.dtype)


class _Extras(NamedTuple):
    """The optional inputs, as the caller gave them."""

    mask: Tensor | None
    context_mask: Tensor | None
    bias: Tensor | None


class _Attention(nn.Module):
    """Norms, projections and heads: what the lowerings share."""

    sequence_first = True

    def __init__(self, spec: LayerSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.scale, self.dtype = spec.heads, spec.scale, dtype
        self.norm = _Norm(spec, spec.dim, dtype) if spec.prenorm else nn.Identity()
        self.context_norm = _Norm(spec, spec.context_dim, dtype) if spec.prenorm else nn.Identity()
        self.to_qk = _Linear(spec.dim, spec.inner_dim, bias=False)
        self.context_to_qk = _Linear(spec.context_dim, spec.inner_dim, bias=False)
        self.to_v = _Linear(spec.dim, spec.inner_dim, bias=False)
        self.context_to_v = _Linear(spec.context_dim, spec.inner_dim, bias=False)
        self.to_out = _Linear(spec.inner_dim, spec.dim, bias=True)
        self.context_to_out = _Linear(spec.inner_dim, spec.context_dim, bias=True)

    def forward(self, x: Tensor, context: Tensor, extras: _Extras) -> tuple[Tensor, ...]:
        x, context = self.norm(x), self.context_norm(context)
        # Scaled before the product, once for both directions: in float16 the unscaled product overflows first.
        qk = self.split(self.to_qk(x)) * self.scale
        context_qk = self.split(self.context_to_qk(context))
        out, context_out, *maps = self.attend(qk, context_qk, self.to_v(x), self.context_to_v(context), extras)
        return self.to_out(_merge(out)), self.context_to_out(_merge(context_out)), *maps

    def attend(self, qk: Tensor, context_qk: Tensor, v: Tensor, context_v: Tensor, extras: _Extras) -> tuple[Tensor, ...]:
        """Return ``out``, ``context_out`` (``[B, H, N, D]``) and whatever attention maps the lowering forms.

        Args:
            qk: queries and keys of ``x``, scaled, ``[B, H, N, D]``.
            context_qk: those of ``context``, ``[B, H, M, D]``.
            v: values of ``x``, ``[N, B, H * D]``.
            context_v: those of ``context``, ``[M, B, H * D]``.
            extras: masks and bias.
        """
        raise NotImplementedError

    def split(self, t: Tensor) -> Tensor:
        """From ``[N, B, H * D]`` to ``[B, H, N, D]``."""
        return t.reshape(*t.shape[:2], self.heads, -1).permute(1, 2, 0, 3)


def _merge(t: Tensor) -> Tensor:
    """From ``[B, H, N, D]`` to ``[N, B, H * D]``."""
    return t.permute(2, 0, 1, 3).flatten(-2)


class _ReferenceAttention(_Attention):
    """The literal graph: one similarity, a softmax over either axis. Forms the attention maps."""

    def __init__(self, spec: LayerSpec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        mix = spec.talking_heads
        self.talking_heads = nn.Conv2d(spec.heads, spec.heads, 1, bias=False) if mix else nn.Identity()
        self.context_talking_heads = nn.Conv2d(spec.heads, spec.heads, 1, bias=False) if mix else nn.Identity()

    def attend(self, qk: Tensor, context_qk: Tensor, v: Tensor, context_v: Tensor, extras: _Extras) -> tuple[Tensor, ...]:
        sim = qk @ context_qk.transpose(-1, -2)
        sim = sim if extras.bias is None else sim + extras.bias.to(self.dtype)
        live = _pairs(extras.mask, extras.context_mask)
        if live is not None:
            sim = torch.where(live, sim, torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype))
        attn = self.talking_heads(sim.softmax(-1))
        context_attn = self.context_talking_heads(sim.softmax(-2))
        return attn @ self.split(context_v), context_attn.transpose(-1, -2) @ self.split(v), attn, context_attn


def _pairs(mask: Tensor | None, context_mask: Tensor | None) -> Tensor | None:
    rows = None if mask is None else mask[:, None, :, None]
    columns = None if context_mask is None else context_mask[:, None, None, :]
    return columns if rows is None else rows if columns is None else rows & columns


class _FusedAttention(_Attention):
    """Two ordinary attentions, each with a key mask only; dead rows get the mean of the values afterwards."""

    def attend(self, qk: Tensor, context_qk: Tensor, v: Tensor, context_v: Tensor, extras: _Extras) -> tuple[Tensor, ...]:
        mask, context_mask, bias = extras
        bias = None if bias is None else bias.to(self.dtype)
        turned = None if bias is None else bias.transpose(-1, -2)
        out = self._one_way(qk, context_qk, context_v, mask, context_mask, bias)
        return out, self._one_way(context_qk, qk, v, context_mask, mask, turned)

    def _one_way(
        self, q: Tensor, k: Tensor, v: Tensor, own: Tensor | None, other: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        sim = q @ k.transpose(-1, -2)
        sim = sim if bias is None else sim + bias
        sim = sim if other is None else sim + self._key_mask(other)
        attended = sim.softmax(-1) @ self.split(v)
        live = _live_rows(own, other)
        return attended if live is None else torch.where(live, attended, self.split(_mean(v)))

    def _key_mask(self, live: Tensor) -> Tensor:
        """Return ``[B, 1, 1, keys]``: 0 where live, the lowest number where dead."""
        zero = torch.zeros((), dtype=self.dtype)
        return torch.where(live, zero, torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype))[:, None, None, :]


def _live_rows(own: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return ``[B, 1, rows or 1, 1]``, true where a row is live; None where no row can be dead."""
    # The sum of floats, not any(): the conversion of any() down to opset 17 fails without a word.
    some = None if other is None else other.float().sum(-1, keepdim=True) > 0
    live = own if some is None else some if own is None else own & some
    return None if live is None else live[:, None, :, None]


def _mean(v: Tensor) -> Tensor:
    """Return the mean over keys ``[1, B, H * D]``, summed in float32: 2048 values of 100 overflow float16."""
    return (v.float().sum(0, keepdim=True) / v.shape[0]).to(v.dtype)


class _CpuAttention(_Attention):
    """For onnxruntime on CPU: its MultiHeadAttention, which never forms an attention map unless it is given a mask.

    So the masks travel inside the heads, as one more feature: ``[q, 1]`` times ``[k, b]`` is ``q k + b``, where ``b`` is 0 at
    live keys and far below every logit at dead ones. A dead query is zero, feature and all: its logits are all 0, and it gets
    the mean over all keys without a select. Activations are ``[batch, length, features]``.
    """

    sequence_first = False

    def forward(self, x: Tensor, context: Tensor, extras: _Extras) -> tuple[Tensor, ...]:
        x, context = self.norm(x), self.context_norm(context)
        qk, context_qk = self.to_qk(x), self.context_to_qk(context)
        v, context_v = self.to_v(x), self.context_to_v(context)
        mask, context_mask, _ = extras
        out = self._one_way(qk, context_qk, context_v, _live_rows(mask, context_mask), context_mask)
        context_out = self._one_way(context_qk, qk, v, _live_rows(context_mask, mask), mask)
        return self.to_out(out), self.context_to_out(context_out)

    def _one_way(self, q: Tensor, k: Tensor, v: Tensor, live: Tensor | None, keys: Tensor | None) -> Tensor:
        if live is not None:
            rows = live[:, 0].float()  # [B, N or 1, 1]
            ones = rows.expand(-1, q.shape[1], -1)
            depths = torch.zeros_like(k[:, :, :1]) if keys is None else torch.where(keys[:, :, None], 0.0, _FAR_BELOW)
            q, k = self._extend(q * rows, ones), self._extend(k, depths)
        attended: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (q, k, v),
            attrs={"num_heads": self.heads, "scale": self.scale},
            dtype=q.dtype,
            shape=(q.shape[0], q.shape[1], v.shape[2]),
            version=1,
        )
        return attended

    def _extend(self, t: Tensor, feature: Tensor) -> Tensor:
        """Add a feature ``[B, N, 1]`` to every head of ``t``, and zeros up to a multiple of 16: odd sizes are slow."""
        batch, length, width = t.shape
        size = width // self.heads
        zeros = t.new_zeros(1, 1, 1).expand(batch, length, -(size + 1) % 16)
        more = torch.cat([feature, zeros], -1)[:, :, None].expand(-1, -1, self.heads, -1)
        return torch.cat([t.reshape(batch, length, self.heads, size), more], -1).flatten(-2)


#: Below every logit by far, and still finite beside one of them.
_FAR_BELOW = -1e30


class _Block(nn.ModuleList):
    """One transformer block, indexed as in the published package: attention, feed-forward, context feed-forward."""

    def __init__(self, spec: LayerSpec, kind: type[_Attention], dtype: torch.dtype) -> None:
        feed = [(spec.dim, spec.ff_hidden or 0), (spec.context_dim, spec.context_ff_hidden or 0)]
        super().__init__([kind(spec, dtype), *(_feed_forward(spec, dim, hidden, dtype) for dim, hidden in feed)])

    def forward(self, x: Tensor, context: Tensor, extras: _Extras) -> tuple[Tensor, Tensor]:
        attention, ff, context_ff = self
        delta, context_delta, *_ = attention(x, context, extras)
        x, context = x + delta, context + context_delta
        return ff(x) + x, context_ff(context) + context


def _feed_forward(spec: LayerSpec, dim: int, hidden: int, dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(_Norm(spec, dim, dtype), _Linear(dim, hidden, bias=True), nn.GELU(), _Linear(hidden, dim, bias=True))


class _Transformer(nn.Module):
    """The blocks in turn, then the final norms where there are any."""

    def __init__(self, spec: LayerSpec, kind: type[_Attention], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(spec, kind, dtype) for _ in range(spec.depth or 0))
        self.norm = _Norm(spec, spec.dim, dtype) if spec.final_norms else nn.Identity()
        self.context_norm = _Norm(spec, spec.context_dim, dtype) if spec.final_norms else nn.Identity()

    def forward(self, x: Tensor, context: Tensor, extras: _Extras) -> tuple[Tensor, ...]:
        for block in self.layers:
            x, context = block(x, context, extras)
        return self.norm(x), self.context_norm(context)


_KINDS: dict[str, type[_Attention]] = {
    "reference": _ReferenceAttention,
    "fused": _FusedAttention,
    "onnxruntime-cpu": _CpuAttention,
}


def _build(spec: LayerSpec, kind: type[_Attention], dtype: torch.dtype) -> nn.Module:
    return kind(spec, dtype) if spec.depth is None else _Transformer(spec, kind, dtype)


class LoweredModel(nn.Module):
    """The traceable module: the lowered layer or transformer as ``core``, with casts and transposes at the edges.

    Args:
        core: the lowered layer or transformer.
        cast_to: what ``x`` and ``context`` are cast to on the way in; None leaves it to the core's norms.
        edge: dtype of the floating-point inputs and outputs.
        attention_maps: return the core's attention maps as well.
        sequence_first: the core takes and returns ``[length, batch, features]``.
    """

    def __init__(
        self, core: nn.Module, cast_to: torch.dtype | None, edge: torch.dtype, attention_maps: bool, sequence_first: bool
    ) -> None:
        super().__init__()
        self.core, self.cast_to, self.edge, self.attention_maps = core, cast_to, edge, attention_maps
        self.sequence_first = sequence_first

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        rel_pos_bias: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run as the reference layer does: the same shapes and results, in the edge dtype."""
        if self.cast_to is not None:
            x, context = x.to(self.cast_to), context.to(self.cast_to)
        extras = _Extras(mask, context_mask, rel_pos_bias)
        out, context_out, *maps = self.core(self._turn(x), self._turn(context), extras)
        shown = maps if self.attention_maps else []
        return tuple(t.to(self.edge) for t in (self._turn(out), self._turn(context_out), *shown))

    def _turn(self, t: Tensor) -> Tensor:
        return t.transpose(0, 1) if self.sequence_first else t
