"""The same function as the reference layer, written the way compilers like it, ready to be traced.

Requires: a checkpoint. Ensures: a module whose parameters carry the seed's names, matrices transposed to ``[in, out]`` so
that the graph holds them as they are; equal to the reference at live and at dead rows.

Inside, activations are ``[length, batch, features]``: batch and heads then lie side by side in memory, and NVIDIA's attention
kernel reads the projections where they are instead of copying each into head order (TensorRT-RTX 1.7.1: 121 MB of scratch
memory instead of 147, at 8x2048x2048). On the CPU it makes little difference (within 4 %).
"""

import torch
from torch import Tensor, nn

from bca_deploy.errors import LoweringError
from bca_deploy.layers.checkpoint import Checkpoint
from bca_deploy.layers.lowered_attention import (
    Attention,
    CpuAttention,
    Extras,
    FusedAttention,
    Linear,
    MaskedCpuAttention,
    Norm,
    ReferenceAttention,
)
from bca_deploy.layers.lowered_relatives import lower_relative
from bca_deploy.layers.stored.weight_files import State
from bca_deploy.spec import DTYPE_OF, Interface, LayerSpec, Lowering, Precision, Runtime

DTYPES: dict[Precision, torch.dtype] = {precision: getattr(torch, name) for precision, name in DTYPE_OF.items()}


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
    masked: bool = True,
) -> "LoweredModel":
    """Return the traceable module.

    Args:
        checkpoint: the layer and its weights.
        lowering: from :func:`choose`.
        precision: what weights and activations are rounded to; normalisation and the mean over values stay in float32.
        keep_io_types: float32 at the edges whatever the precision.
        attention_maps: return both attention maps as well; needs the ``reference`` lowering of a bare layer.
        runtime: ``onnxruntime-cpu`` takes that runtime's own attention operator; where :func:`has_cpu_form` says so.
        masked: the model has one mask or both; only the form for onnxruntime on the CPU needs to know.

    Returns:
        A module in eval mode; call it as the reference layer.

    Raises:
        LoweringError: attention maps from a form that has none.
    """
    if attention_maps and (lowering == "fused" or checkpoint.spec.depth is not None):
        raise LoweringError("attention maps exist only in the 'reference' lowering of a bare layer")
    dtype = DTYPES[precision]
    if checkpoint.spec.family != "seed":
        core = lower_relative(checkpoint.spec, checkpoint.state, lowering, dtype, runtime, masked)
        return LoweredModel(core, dtype, torch.float32 if keep_io_types else dtype, False, sequence_first=False).eval()
    kind = _kind(lowering, runtime, masked)
    with torch.device("meta"):
        core = _build(checkpoint.spec, kind, dtype)
    core.load_state_dict(graph_state(checkpoint, lowering, precision, runtime, masked), assign=True)
    edge = torch.float32 if keep_io_types else dtype
    # A prenorm layer reads its inputs through a norm alone, which works in float32 anyway.
    cast = checkpoint.spec.depth is not None or not checkpoint.spec.prenorm
    return LoweredModel(core, dtype if cast else None, edge, attention_maps, kind.sequence_first).eval()


def has_cpu_form(lowering: Lowering, precision: Precision, interface: Interface) -> bool:
    """Whether there is a second form of the model for onnxruntime on CPU: fused, float32, no bias."""
    return lowering == "fused" and precision == "fp32" and interface.rel_pos_bias == "none"


def graph_state(
    checkpoint: Checkpoint, lowering: Lowering, precision: Precision, runtime: Runtime = "portable", masked: bool = True
) -> State:
    """Return the weights as a graph holds them; arguments as for :func:`lower`."""
    state, more = _rounded(checkpoint.state, DTYPES[precision]), _kind(lowering, runtime, masked).features
    return {
        name: _widened(tensor, checkpoint.spec, more) if _is_query_or_key(name) else tensor for name, tensor in state.items()
    }


def _rounded(state: State, dtype: torch.dtype) -> State:
    """Return the weights as the graph holds them: rounded to ``dtype``, matrices as ``[in, out]``, norms in float32."""
    rounded = {name: tensor.to(dtype) for name, tensor in state.items()}
    norms = {name for name in state if _is_norm(name)}
    return {
        name: tensor.float() if name in norms else tensor.t().contiguous() if tensor.ndim == 2 else tensor
        for name, tensor in rounded.items()
    }


def _widened(weight: Tensor, spec: LayerSpec, more: int) -> Tensor:
    """Return a query weight ``[in, H * D]`` with so many more columns of zeros for every head."""
    heads = weight.reshape(-1, spec.heads, spec.dim_head)
    return torch.cat([heads, heads.new_zeros(*heads.shape[:2], more)], -1).flatten(-2)


def _is_query_or_key(name: str) -> bool:
    return name.split(".")[-2].endswith("to_qk")


def _is_norm(name: str) -> bool:
    owner = name.split(".")[:-1]
    return owner[-1] in ("norm", "context_norm") or (len(owner) == 4 and owner[-2] in ("1", "2") and owner[-1] == "0")


class _Block(nn.ModuleList):
    """One transformer block, indexed as in the published package: attention, feed-forward, context feed-forward."""

    def __init__(self, spec: LayerSpec, kind: type[Attention], dtype: torch.dtype) -> None:
        feed = [(spec.dim, spec.ff_hidden or 0), (spec.context_dim, spec.context_ff_hidden or 0)]
        super().__init__([kind(spec, dtype), *(_feed_forward(spec, dim, hidden, dtype) for dim, hidden in feed)])

    def forward(self, x: Tensor, context: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
        attention, ff, context_ff = self
        delta, context_delta, *_ = attention(x, context, extras)
        x, context = x + delta, context + context_delta
        return ff(x) + x, context_ff(context) + context


def _feed_forward(spec: LayerSpec, dim: int, hidden: int, dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(Norm(spec, dim, dtype), Linear(dim, hidden, bias=True), nn.GELU(), Linear(hidden, dim, bias=True))


class _Transformer(nn.Module):
    """The blocks in turn, then the final norms where there are any."""

    def __init__(self, spec: LayerSpec, kind: type[Attention], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(spec, kind, dtype) for _ in range(spec.depth or 0))
        self.norm = Norm(spec, spec.dim, dtype) if spec.final_norms else nn.Identity()
        self.context_norm = Norm(spec, spec.context_dim, dtype) if spec.final_norms else nn.Identity()

    def forward(self, x: Tensor, context: Tensor, extras: Extras) -> tuple[Tensor, ...]:
        for block in self.layers:
            x, context = block(x, context, extras)
        return self.norm(x), self.context_norm(context)


def _kind(lowering: Lowering, runtime: Runtime, masked: bool) -> type[Attention]:
    if lowering == "reference":
        return ReferenceAttention
    if runtime == "onnxruntime-cpu":
        return MaskedCpuAttention if masked else CpuAttention
    return FusedAttention


def _build(spec: LayerSpec, kind: type[Attention], dtype: torch.dtype) -> nn.Module:
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
        extras = Extras(mask, context_mask, rel_pos_bias)
        out, context_out, *maps = self.core(self._turn(x), self._turn(context), extras)
        shown = maps if self.attention_maps else []
        return tuple(t.to(self.edge) for t in (self._turn(out), self._turn(context_out), *shown))

    def _turn(self, t: Tensor) -> Tensor:
        return t.transpose(0, 1) if self.sequence_first else t
