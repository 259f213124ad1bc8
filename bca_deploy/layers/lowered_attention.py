"""The attention of the layer as compilers like it: one class for each form, with the norms and projections they share.

Requires: weights as :func:`bca_deploy.layers.lowered_model.graph_state` gives them. Ensures: equal to the reference at live and
dead rows.

A row is dead where its own mask is false or no key is live; the reference gives it the mean over ALL values, padded ones
too, because its whole row is filled with one number before the softmax. A key mask alone cannot do that, so ``fused``
computes two ordinary attentions and selects the mean for dead rows afterwards; the form for onnxruntime on CPU makes all
logits of a dead row equal instead.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bca_deploy.spec import LayerSpec


class Linear(nn.Module):
    """``x @ weight + bias`` with the weight as ``[in, out]``, so that the graph needs no transpose."""

    def __init__(self, width_in: int, width_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_in, width_out))
        self.bias = nn.Parameter(torch.empty(width_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Project the last axis."""
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


class Norm(nn.Module):
    """The spec's normalisation, in float32 whatever comes in: squares of half-precision activations overflow."""

    def __init__(self, spec: LayerSpec, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.eps, self.dim, self.dtype = spec.norm, spec.norm_eps, dim, dtype
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if spec.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        wide = x.float()
        if self.kind == "layer":
            return functional.layer_norm(wide, (self.dim,), self.weight, self.bias, self.eps).to(self.dtype)
        # Sum, not mean: the conversion of ReduceMean down to opset 17 fails without a word.
        root = ((wide * wide).sum(-1, keepdim=True) / self.dim + self.eps).sqrt()
        return (wide / root * self.weight).to(self.dtype)


class Extras(NamedTuple):
    """The optional inputs, as the caller gave them."""

    mask: Tensor | None
    context_mask: Tensor | None
    bias: Tensor | None


class Attention(nn.Module):
    """Norms, projections and heads: what the lowerings share."""

    sequence_first = True
    features = 0  # of the masks, in every head of queries and keys

    def __init__(self, spec: LayerSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.prenorm = spec.prenorm
        width = spec.heads * (spec.dim_head + self.features)
        self.heads, self.head_size, self.scale, self.dtype = spec.heads, spec.dim_head, spec.scale, dtype
        self.norm = Norm(spec, spec.dim, dtype) if spec.prenorm else nn.Identity()
        self.context_norm = Norm(spec, spec.context_dim, dtype) if spec.prenorm else nn.Identity()
        bias = spec.kin.projection_bias
        self.to_qk = Linear(spec.dim, width, bias)
        self.context_to_qk = Linear(spec.context_dim, width, bias)
        self.to_v = Linear(spec.dim, spec.inner_dim, bias)
        self.context_to_v = Linear(spec.context_dim, spec.inner_dim, bias)
        self.to_out = Linear(spec.inner_dim, spec.dim, bias=True)
        self.context_to_out = Linear(spec.inner_dim, spec.context_dim, bias=True)

    def forward(self, x: Tensor, context: Tensor, extras: Extras) -> tuple[Tensor, ...]:
        """Return ``out``, ``context_out`` and whatever attention maps the form has; the axes as it keeps its activations."""
        x, context = self.norm(x), self.context_norm(context)
        # Scaled before the product, once for both directions: in float16 the unscaled product overflows first.
        qk = self.split(self.quiet(self.to_qk(x), extras.mask)) * self.scale
        context_qk = self.split(self.quiet(self.context_to_qk(context), extras.context_mask))
        out, context_out, *maps = self.attend(qk, context_qk, self.to_v(x), self.context_to_v(context), extras)
        return self.to_out(self.merge(out)), self.context_to_out(self.merge(context_out)), *maps

    def quiet(self, qk: Tensor, mask: Tensor | None) -> Tensor:
        """Return queries and keys with nothing at padding that would show through what hides it."""
        return qk

    def attend(self, qk: Tensor, context_qk: Tensor, v: Tensor, context_v: Tensor, extras: Extras) -> tuple[Tensor, ...]:
        """Return ``out``, ``context_out`` (``[B, H, N, D]``) and whatever attention maps the lowering forms.

        Args:
            qk: queries and keys of ``x``, scaled, ``[B, H, N, D]``.
            context_qk: those of ``context``, ``[B, H, M, D]``.
            v: values of ``x``, ``[N, B, H * D]``.
            context_v: those of ``context``, ``[M, B, H * D]``.
            extras: masks and bias.
        """
        raise NotImplementedError

    def _lowest(self) -> Tensor:
        return torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype)

    def split(self, t: Tensor) -> Tensor:
        """From ``[N, B, H * D]`` to ``[B, H, N, D]``."""
        return t.reshape(*t.shape[:2], self.heads, -1).permute(1, 2, 0, 3)

    def merge(self, t: Tensor) -> Tensor:
        """From ``[B, H, N, D]`` to ``[N, B, H * D]``."""
        return t.permute(2, 0, 1, 3).flatten(-2)

    def rows(self, mask: Tensor) -> Tensor:
        """From ``[B, N]`` to what broadcasts over activations."""
        return mask.t()[..., None]


class ReferenceAttention(Attention):
    """The literal graph: one similarity, a softmax over either axis. Forms the attention maps."""

    def __init__(self, spec: LayerSpec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        mix = spec.talking_heads
        self.talking_heads = nn.Conv2d(spec.heads, spec.heads, 1, bias=False) if mix else nn.Identity()
        self.context_talking_heads = nn.Conv2d(spec.heads, spec.heads, 1, bias=False) if mix else nn.Identity()

    def attend(self, qk: Tensor, context_qk: Tensor, v: Tensor, context_v: Tensor, extras: Extras) -> tuple[Tensor, ...]:
        """Return both outputs and both attention maps; arguments as for :meth:`Attention.attend`."""
        sim = qk @ context_qk.transpose(-1, -2)
        sim = sim if extras.bias is None else sim + extras.bias.to(self.dtype)
        live = _pairs(extras.mask, extras.context_mask)
        if live is not None:
            sim = torch.where(live, sim, self._lowest())
        attn = self.talking_heads(sim.softmax(-1))
        context_attn = self.context_talking_heads(sim.softmax(-2))
        return attn @ self.split(context_v), context_attn.transpose(-1, -2) @ self.split(v), attn, context_attn


def _pairs(mask: Tensor | None, context_mask: Tensor | None) -> Tensor | None:
    rows = None if mask is None else mask[:, None, :, None]
    columns = None if context_mask is None else context_mask[:, None, None, :]
    return columns if rows is None else rows if columns is None else rows & columns


class FusedAttention(Attention):
    """Two ordinary attentions, each with a key mask only; dead rows get the mean of the values afterwards."""

    def quiet(self, qk: Tensor, mask: Tensor | None) -> Tensor:
        """Return zeros at padding, which may hold anything: a key mask that is added hides only what is small beside it.

        Behind a norm there is nothing large, whatever came in.
        """
        if mask is None or self.prenorm:
            return qk
        return torch.where(self.rows(mask), qk, torch.zeros((), dtype=qk.dtype))

    def attend(self, qk: Tensor, context_qk: Tensor, v: Tensor, context_v: Tensor, extras: Extras) -> tuple[Tensor, ...]:
        """Return both outputs; arguments as for :meth:`Attention.attend`."""
        mask, context_mask, bias = extras
        bias = None if bias is None else bias.to(self.dtype)
        turned = None if bias is None else bias.transpose(-1, -2)
        out = self._one_way(qk, context_qk, context_v, mask, context_mask, bias)
        return out, self._one_way(context_qk, qk, v, context_mask, mask, turned)

    def _one_way(
        self, q: Tensor, k: Tensor, v: Tensor, own: Tensor | None, other: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        sim = q @ k.transpose(-1, -2)
        if bias is not None:
            sim = sim + bias
        if other is not None:
            # The bias of a padded pair may be anything too, and no norm comes before it.
            sim = sim + self._key_mask(other) if bias is None else torch.where(other[:, None, None, :], sim, self._lowest())
        attended = sim.softmax(-1) @ self.split(v)
        live = live_rows(own, other)
        return attended if live is None else torch.where(live, attended, self.dead(v))

    def dead(self, v: Tensor) -> Tensor:
        """Return what a row gives that has no live key, of values as they are kept."""
        return self.split(_mean(v))

    def _key_mask(self, live: Tensor) -> Tensor:
        """Return ``[B, 1, 1, keys]``: 0 where live, the lowest number where dead."""
        return torch.where(live, torch.zeros((), dtype=self.dtype), self._lowest())[:, None, None, :]


def live_rows(own: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return ``[B, 1, rows or 1, 1]``, true where a row is live; None where no row can be dead."""
    # The sum of floats, not any(): the conversion of any() down to opset 17 fails without a word.
    some = None if other is None else other.float().sum(-1, keepdim=True) > 0
    live = own if some is None else some if own is None else own & some
    return None if live is None else live[:, None, :, None]


def _mean(v: Tensor) -> Tensor:
    """Return the mean over keys ``[1, B, H * D]``, summed in float32: 2048 values of 100 overflow float16."""
    return (v.float().sum(0, keepdim=True) / v.shape[0]).to(v.dtype)


class CpuAttention(Attention):
    """For onnxruntime on CPU: its MultiHeadAttention. Activations are ``[batch, length, features]``."""

    sequence_first = False

    def forward(self, x: Tensor, context: Tensor, extras: Extras) -> tuple[Tensor, ...]:
        """Return ``out`` and ``context_out``."""
        x, context = self.norm(x), self.context_norm(context)
        qk, context_qk = self.to_qk(self.heard(x, extras.mask)), self.context_to_qk(self.heard(context, extras.context_mask))
        qk, context_qk = self.mark(qk, context_qk, extras)
        out = self._one_way(qk, context_qk, self.context_to_v(context))
        context_out = self._one_way(context_qk, qk, self.to_v(x))
        out, context_out = self.settled(out, context_out, extras)
        return self.to_out(out), self.context_to_out(context_out)

    def settled(self, out: Tensor, context_out: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
        """Return both with dead rows as the family has them."""
        return out, context_out

    def heard(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return what queries and keys are made of."""
        return x

    def mark(self, qk: Tensor, context_qk: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
        """Return both with what the masks say inside of them."""
        return qk, context_qk

    def _one_way(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (q, k, v),
            attrs={"num_heads": self.heads, "scale": self.scale},
            dtype=q.dtype,
            shape=(q.shape[0], q.shape[1], v.shape[2]),
            version=1,
        )
        return attended


#: Below every logit by far: beside it, float32 keeps nothing of a logit under 3e22.
_FAR = -1e30
_Pair = tuple[float, float]


class MaskedCpuAttention(CpuAttention):
    """The same with masks. The operator never forms an attention map unless it is given a mask, so it is given none.

    The masks travel inside the heads, as two more features: of ``x`` ``[qk, 1, 0]`` where it is live and ``[qk, 0, far]`` where
    it is dead, of the context ``[qk, 0, 1]`` and ``[qk, far, 1]``. The product of the two is the logit where both are live,
    and ``far`` everywhere else, as nothing is left of a logit beside it: at a dead key, and at a dead query whatever the key,
    which gives it the mean over all. One tensor a side serves both directions, and the columns come with the weights.
    """

    features = 2

    def heard(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return zeros at padding, which may hold anything: ``far`` hides only what is small beside it.

        Behind a norm there is nothing large. A product, as onnxruntime's Where takes three passes on one thread; before the
        projection, as zero times what overflows there is NaN.
        """
        return x if mask is None or self.prenorm else x * mask.to(x.dtype)[..., None]

    def mark(self, qk: Tensor, context_qk: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
        """Add the features to queries and keys of both sides."""
        marks = self._marks(extras.mask, live=(1, 0), dead=(0, _FAR))
        return qk + marks, context_qk + self._marks(extras.context_mask, live=(0, 1), dead=(_FAR, 1))

    def _marks(self, mask: Tensor | None, live: _Pair, dead: _Pair) -> Tensor:
        """Return ``[B, N, H * (D + 2)]``, zero but for the features; one row where there is no mask."""
        marks = [([0.0] * self.head_size + [*pair]) * self.heads for pair in (dead, live)]
        rows = torch.tensor(marks, dtype=self.dtype)  # said, or the caller's default decides
        return rows[1] if mask is None else functional.embedding(mask.int(), rows)
