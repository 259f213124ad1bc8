"""Wrong models for benchmarks/verdict.py and the tests: mistakes that exporters, converters and runtimes really make."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from layers import Structure
from torch import Tensor

from bca_deploy.layers import lowered_attention
from bca_deploy.layers.lowered_attention import (
    Attention,
    Extras,
    FusedAttention,
    Linear,
    MaskedCpuAttention,
    Norm,
    ReferenceAttention,
)
from bca_deploy.layers.lowered_model import LoweredModel, has_cpu_form
from bca_deploy.spec import Precision

_ALL: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
_FP32: tuple[Precision, ...] = ("fp32",)
Wanted = Callable[[Structure], bool]


@dataclass(frozen=True)
class Defect:
    """One mistake.

    Attributes:
        name: what went wrong.
        owner: the class or module that has it.
        member: what is replaced there.
        wrong: made from what was there.
        applies: whether it changes the function of such a layer.
        precisions: where it is planted.
        form: 0 in the portable graph, 1 in the one for onnxruntime on the CPU.
        note: where it cannot be seen, and why.
    """

    name: str
    owner: Any
    member: str
    wrong: Callable[[Any], Any]
    applies: Wanted
    precisions: tuple[Precision, ...] = _ALL
    form: int = 0
    note: str = ""

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """Trace with the mistake while the block runs."""
        with patch.object(self.owner, self.member, self.wrong(getattr(self.owner, self.member))):
            yield


def fused(made: Structure) -> bool:
    return made.lowering == "fused" and many(made)


def literal(made: Structure) -> bool:
    return made.lowering == "reference" and many(made)


def on_the_cpu(made: Structure) -> bool:
    return fused(made) and has_cpu_form(made.lowering, "fp32", made.interface)


def many(made: Structure) -> bool:
    """Whether there are several tokens on either side: softmax over one key is 1 whatever happens to the logits."""
    return made.dims["x_len"].max > 3 and made.dims["context_len"].max > 3


def masked(made: Structure) -> bool:
    return made.interface.mask and made.interface.context_mask


def both(*wanted: Wanted) -> Wanted:
    return lambda made: all(condition(made) for condition in wanted)


def zero_mean(_: Any) -> Any:
    return lambda v: v[:1] * 0


def live_mean(right: Any) -> Any:
    """Dead rows get the mean over the live keys alone."""

    def one_way(self: Any, q: Tensor, k: Tensor, v: Tensor, own: Any, other: Any, bias: Any) -> Tensor:
        weights = other.to(v.dtype).t()[..., None]
        mean = (v * weights).sum(0, keepdim=True) / weights.sum(0, keepdim=True).clamp(min=1)
        with patch.object(lowered_attention, "_mean", lambda _: mean):
            attended: Tensor = right(self, q, k, v, own, other, bias)
        return attended

    return one_way


def ten_thousand(_: Any) -> Any:
    def key_mask(self: Any, live: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=self.dtype)
        return torch.where(live, zero, torch.full((), -10000.0, dtype=self.dtype))[:, None, None, :]

    return key_mask


def literal_ten_thousand(right: Any) -> Any:
    class Finfo:
        min = -10000.0

    def attend(self: Any, *args: Any) -> Any:
        with patch.object(torch, "finfo", lambda _: Finfo):
            return right(self, *args)

    return attend


def fill_on_the_cpu(_: Any) -> float:
    return -10000.0


def swapped_masks(right: Any) -> Any:
    def forward(
        self: Any, x: Tensor, context: Tensor, mask: Any = None, context_mask: Any = None, rel_pos_bias: Any = None
    ) -> Any:
        # Cut or filled up with its last entry where the lengths differ: as they are, others than equal ones would not even run.
        rows, columns = torch.arange(x.shape[1]), torch.arange(context.shape[1])
        x_mask = context_mask[:, torch.minimum(rows, columns[-1])]
        other = mask[:, torch.minimum(columns, rows[-1])]
        return right(self, x, context, x_mask, other, rel_pos_bias)

    return forward


def shifted_mask(right: Any) -> Any:
    def key_mask(self: Any, live: Tensor) -> Tensor:
        shifted: Tensor = right(self, torch.cat([live[:, -1:], live[:, :-1]], 1))
        return shifted

    return key_mask


def lost_key(right: Any) -> Any:
    """The first live key of every batch row is taken for dead."""

    def key_mask(self: Any, live: Tensor) -> Tensor:
        first = (live.float().cumsum(1) == 1) & live
        lost: Tensor = right(self, live & ~first)
        return lost

    return key_mask


def unturned_bias(_: Any) -> Any:
    def attend(self: Any, qk: Tensor, context_qk: Tensor, v: Tensor, context_v: Tensor, extras: Extras) -> Any:
        mask, context_mask, bias = extras
        assert bias is not None  # noqa: S101
        unturned = bias.reshape(*bias.shape[:-2], bias.shape[-1], bias.shape[-2])
        out = self._one_way(qk, context_qk, context_v, mask, context_mask, bias)
        return out, self._one_way(context_qk, qk, v, context_mask, mask, unturned)

    return attend


def scaled_twice(right: Any) -> Any:
    def split(self: Any, t: Tensor) -> Tensor:
        heads: Tensor = right(self, t)
        return heads * self.scale

    return split


def rolled_heads(right: Any) -> Any:
    """The values of the heads are handed on by one."""

    def split(self: Any, t: Tensor) -> Tensor:
        heads: Tensor = right(self, t)
        return torch.cat([heads[:, 1:], heads[:, :1]], 1)

    return split


def other_epsilon(right: Any) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        before, self.eps = self.eps, 1e-6
        normal: Tensor = right(self, x)
        self.eps = before
        return normal

    return forward


def tf32_product(right: Any) -> Any:
    """Both operands keep eleven significant bits: Dekker's splitting, 1971."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return right(self, x) if self.bias is None else _tf32(x) @ _tf32(_unfolded(self.weight, x)) + self.bias

    return forward


def _unfolded(weight: Tensor, x: Tensor) -> Tensor:
    """Keep the exporter from working on the weight ahead of time: the graph is to hold it as it is."""
    return weight + 0.0 * x.flatten()[0]


def _tf32(t: Tensor) -> Tensor:
    stretched = t * 8193.0
    return stretched - (stretched - t)


def half_accumulation(right: Any) -> Any:
    """The output projection adds up quarters of its terms with float16's eleven bits.

    Not as float16: onnxruntime on the CPU would add in float32 and drop the casts.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.bias is None:
            return right(self, x)
        quarter = x.shape[-1] // 4
        pieces = [slice(i * quarter, (i + 1) * quarter if i < 3 else None) for i in range(4)]
        weight, total = _unfolded(self.weight, x), _unfolded(self.bias, x)
        for piece in pieces:
            total = _tf32(total + x[..., piece] @ weight[piece])
        return total

    return forward


def half_queries(right: Any) -> Any:
    def split(self: Any, t: Tensor) -> Tensor:
        heads: Tensor = right(self, t)
        return heads.half().to(heads.dtype)

    return split


def half_softmax(_: Any) -> Any:
    def one_way(self: Any, q: Tensor, k: Tensor, v: Tensor, own: Any, other: Any, bias: Any) -> Tensor:
        sim = q @ k.transpose(-1, -2)
        sim = sim if bias is None else sim + bias
        sim = sim if other is None else sim + self._key_mask(other)
        attended = sim.softmax(-1).half().to(self.dtype) @ self.split(v)
        live = lowered_attention.live_rows(own, other)
        mean = self.split(lowered_attention._mean(v))
        return attended if live is None else torch.where(live, attended, mean)

    return one_way


def unmixed_heads(right: Any) -> Any:
    """The first talking-heads convolution is left out."""

    def attend(self: Any, *args: Any) -> Any:
        mix = self.talking_heads.forward
        with patch.object(self.talking_heads, "forward", lambda attn: attn + 0.0 * mix(attn)):
            return right(self, *args)

    return attend


def kept_values(right: Any) -> Any:
    """Dead queries of the graph for the CPU keep their logits."""

    def marks(self: Any, mask: Any, live: tuple[float, float], dead: tuple[float, float]) -> Any:
        return right(self, mask, live, (dead[0], live[1]))

    return marks


def _needs_epsilon(made: Structure) -> bool:
    return made.spec.prenorm


DEFECTS = (
    Defect("dead rows zero", lowered_attention, "_mean", zero_mean, both(fused, masked)),
    Defect("dead rows get the mean of the live values", FusedAttention, "_one_way", live_mean, both(fused, masked)),
    Defect(
        "fill of -10000",
        FusedAttention,
        "_key_mask",
        ten_thousand,
        both(fused, masked),
        ("fp32", "bf16"),
        note="not in fp16: padding's logits are 0 there, and the lowest live ones that PyTorch reaches are -9000",
    ),
    Defect(
        "fill of -10000, literal graph",
        ReferenceAttention,
        "attend",
        literal_ten_thousand,
        both(literal, masked),
        ("fp32", "bf16"),
        note="not in fp16: it shows only at logits below -10000, on the way to which PyTorch overflows in float16",
    ),
    Defect("fill of -10000, graph for the CPU", lowered_attention, "_FAR", fill_on_the_cpu, both(on_the_cpu, masked), _FP32, 1),
    Defect("dead queries keep their logits", MaskedCpuAttention, "_marks", kept_values, both(on_the_cpu, masked), _FP32, 1),
    Defect("masks swapped", LoweredModel, "forward", swapped_masks, both(fused, masked)),
    Defect("mask shifted by one", FusedAttention, "_key_mask", shifted_mask, both(fused, masked)),
    Defect("one live key lost", FusedAttention, "_key_mask", lost_key, both(fused, masked)),
    Defect(
        "bias reshaped, not transposed",
        FusedAttention,
        "attend",
        unturned_bias,
        both(fused, lambda made: made.interface.rel_pos_bias != "none"),
    ),
    Defect("scaled twice", Attention, "split", scaled_twice, fused),
    Defect("heads handed on by one", Attention, "split", rolled_heads, both(fused, lambda made: made.spec.heads > 1)),
    Defect("talking heads left out", ReferenceAttention, "attend", unmixed_heads, literal),
    Defect("epsilon of 1e-6", Norm, "forward", other_epsilon, both(fused, _needs_epsilon)),
    Defect("TF32 in the output projections", Linear, "forward", tf32_product, many, _FP32),
    Defect("output projections accumulate in float16", Linear, "forward", half_accumulation, many, _FP32),
    Defect("float16 queries and keys", Attention, "split", half_queries, fused, _FP32),
    Defect("float16 softmax", FusedAttention, "_one_way", half_softmax, fused, _FP32),
)
