"""The reference layer: it defines what is correct, plainly and slowly. Parameter names are the seed's.

The optimised graphs (layers/lowered_model.py) take nothing from here but the weights.
"""

from typing import cast, get_args

import torch
from einops import rearrange
from torch import Tensor, einsum, nn

from bca_deploy.errors import InputError, check_one_of
from bca_deploy.spec import NORM_EPS, LayerSpec, Norm


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * weight`` over the last axis; half precision is normalised in float32.

    Zhang and Sennrich, 2019, "Root Mean Square Layer Normalization".
    """

    def __init__(self, dim: int, eps: float = NORM_EPS["rms"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x [..., D]``; the result has its dtype."""
        # Squares of half-precision activations overflow from 256 up.
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        root = (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (wide * root * self.weight.to(wide.dtype)).to(x.dtype)


def _norm(kind: Norm, dim: int, eps: float) -> nn.Module:
    return nn.LayerNorm(dim, eps=eps) if kind == "layer" else RMSNorm(dim, eps)


class BidirectionalCrossAttention(nn.Module):
    """Two sequences attend to each other through one similarity matrix, softmaxed over either axis.

    Args:
        dim: features of ``x``.
        heads: attention heads.
        dim_head: features of one head.
        context_dim: features of ``context``; ``dim`` where None.
        dropout: probability on both attention maps, in training only.
        talking_heads: mix the heads by a 1x1 convolution after the softmax.
        prenorm: normalise both inputs first.
        norm: ``layer`` as in the seed, ``rms`` as in the published package 0.1.0.
        norm_eps: epsilon of the normalisation; the kind's default where None.
    """

    def __init__(  # noqa: PLR0913  (the seed's signature)
        self,
        *,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        context_dim: int | None = None,
        dropout: float = 0.0,
        talking_heads: bool = False,
        prenorm: bool = False,
        norm: Norm = "layer",
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        context_dim = dim if context_dim is None else context_dim
        inner = heads * dim_head
        check_one_of("norm", norm, get_args(Norm))
        eps = NORM_EPS[norm] if norm_eps is None else norm_eps
        self.heads = heads
        self.scale = dim_head**-0.5
        self.norm = _norm(norm, dim, eps) if prenorm else nn.Identity()
        self.context_norm = _norm(norm, context_dim, eps) if prenorm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.context_dropout = nn.Dropout(dropout)
        self.to_qk = nn.Linear(dim, inner, bias=False)
        self.context_to_qk = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.context_to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim)
        self.context_to_out = nn.Linear(inner, context_dim)
        self.talking_heads = nn.Conv2d(heads, heads, 1, bias=False) if talking_heads else nn.Identity()
        self.context_talking_heads = nn.Conv2d(heads, heads, 1, bias=False) if talking_heads else nn.Identity()

    def similarity(self, x: Tensor, context: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        """Return the unmasked logits ``[B, H, N, M]`` of normalised ``x [B, N, D]`` and ``context [B, M, C]``."""
        qk = rearrange(self.to_qk(x), "b n (h d) -> b h n d", h=self.heads)
        context_qk = rearrange(self.context_to_qk(context), "b n (h d) -> b h n d", h=self.heads)
        sim: Tensor = einsum("b h i d, b h j d -> b h i j", qk, context_qk) * self.scale
        return sim if rel_pos_bias is None else sim + rel_pos_bias

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        return_attn: bool = False,
        rel_pos_bias: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Attend both ways.

        Args:
            x: ``[B, N, D]``.
            context: ``[B, M, C]``, same dtype and device.
            mask: bool ``[B, N]``, true where ``x`` is real; all true where None.
            context_mask: bool ``[B, M]``.
            return_attn: return both attention maps as well.
            rel_pos_bias: ``[N, M]``, ``[H, N, M]`` or ``[1 or B, H, N, M]``, added before masking.

        Returns:
            ``out [B, N, D]`` and ``context_out [B, M, C]``; with ``return_attn`` also ``attn`` and ``context_attn``,
            both ``[B, H, N, M]``, softmaxed over the last axis and over the one before it.
        """
        x, context = self.norm(x), self.context_norm(context)
        sim = _fill_dead(self.similarity(x, context, rel_pos_bias), mask, context_mask)
        attn = self.talking_heads(self.dropout(sim.softmax(dim=-1)))
        context_attn = self.context_talking_heads(self.context_dropout(sim.softmax(dim=-2)))
        v = rearrange(self.to_v(x), "b n (h d) -> b h n d", h=self.heads)
        context_v = rearrange(self.context_to_v(context), "b n (h d) -> b h n d", h=self.heads)
        out = einsum("b h i j, b h j d -> b h i d", attn, context_v)
        context_out = einsum("b h j i, b h j d -> b h i d", context_attn, v)
        out = self.to_out(rearrange(out, "b h n d -> b n (h d)"))
        context_out = self.context_to_out(rearrange(context_out, "b h n d -> b n (h d)"))
        return (out, context_out, attn, context_attn) if return_attn else (out, context_out)


def _fill_dead(sim: Tensor, mask: Tensor | None, context_mask: Tensor | None) -> Tensor:
    """Put the dtype's lowest number where either side is masked: a row of nothing else becomes uniform."""
    if mask is None and context_mask is None:
        return sim
    batch, _, rows, columns = sim.shape
    mask = torch.ones(batch, rows, dtype=torch.bool, device=sim.device) if mask is None else mask
    context_mask = torch.ones(batch, columns, dtype=torch.bool, device=sim.device) if context_mask is None else context_mask
    both = rearrange(mask, "b i -> b 1 i 1") & rearrange(context_mask, "b j -> b 1 1 j")
    return sim.masked_fill(~both, -torch.finfo(sim.dtype).max)


def _feed_forward(dim: int, hidden: int, eps: float) -> nn.Sequential:
    return nn.Sequential(RMSNorm(dim, eps), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class BidirectionalCrossAttentionTransformer(nn.Module):
    """The published package's transformer: attention and feed-forward, both residual, on both sequences.

    Its normalisation is always RMSNorm, and it has no attention maps to return.

    Args:
        spec: a specification whose ``depth`` is set.
        dropout: probability on the attention maps, in training only.
    """

    def __init__(self, spec: LayerSpec, dropout: float = 0.0) -> None:
        super().__init__()
        if spec.depth is None or spec.ff_hidden is None or spec.context_ff_hidden is None:
            raise InputError("a transformer needs layer.depth, layer.ff_hidden and layer.context_ff_hidden")
        self.layers = nn.ModuleList()
        for _ in range(spec.depth):
            attention = _attention(spec, dropout)
            ff = _feed_forward(spec.dim, spec.ff_hidden, spec.norm_eps)
            context_ff = _feed_forward(spec.context_dim, spec.context_ff_hidden, spec.norm_eps)
            self.layers.append(nn.ModuleList([attention, ff, context_ff]))
        self.norm = RMSNorm(spec.dim, spec.norm_eps) if spec.final_norms else nn.Identity()
        self.context_norm = RMSNorm(spec.dim, spec.norm_eps) if spec.final_norms else nn.Identity()

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        return_attn: bool = False,
        rel_pos_bias: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the blocks; arguments and results as for the layer, attention maps excepted.

        Raises:
            InputError: ``return_attn``, which the published transformer accepts and ignores.
        """
        if return_attn:
            raise InputError(
                "return_attn: the published transformer ignores it and returns no attention maps; use one of its layers instead"
            )
        for block in self.layers:
            attention, ff, context_ff = cast(nn.ModuleList, block)
            delta, context_delta = attention(x, context, mask, context_mask, rel_pos_bias=rel_pos_bias)
            x, context = x + delta, context + context_delta
            x, context = ff(x) + x, context_ff(context) + context
        return self.norm(x), self.context_norm(context)


def _attention(spec: LayerSpec, dropout: float) -> BidirectionalCrossAttention:
    return BidirectionalCrossAttention(
        dim=spec.dim,
        context_dim=spec.context_dim,
        heads=spec.heads,
        dim_head=spec.dim_head,
        dropout=dropout,
        talking_heads=spec.talking_heads,
        prenorm=spec.prenorm,
        norm=spec.norm,
        norm_eps=spec.norm_eps,
    )


def build(spec: LayerSpec, dropout: float = 0.0) -> nn.Module:
    """Return the reference module that ``spec`` describes, with fresh weights, in training mode."""
    return _attention(spec, dropout) if spec.depth is None else BidirectionalCrossAttentionTransformer(spec, dropout)
