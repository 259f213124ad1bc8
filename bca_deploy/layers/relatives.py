"""The layer's relatives: the reference of each, plainly and slowly, and how one is read from a live module."""

from typing import cast

import torch
from torch import Tensor, nn

from bca_deploy.errors import CheckpointError, InputError, nearest
from bca_deploy.families import FAMILIES, Family
from bca_deploy.layers.reference import BidirectionalCrossAttention
from bca_deploy.spec import LayerSpec

# What LightGlue's feed-forward is made of: Linear, LayerNorm, GELU, Linear.
_FEED_FORWARD = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")


def family_of(module: nn.Module) -> Family | None:
    """Return the family whose linear layers stand directly in the module; None where none does."""
    children = set(module._modules)
    for row in FAMILIES.values():
        wanted = {*row.projections, *([row.feed_forward] if row.feed_forward else [])}
        if wanted <= children and not ("context_to_qk" in children and "context_to_qk" not in row.projections):
            return row
    return None


def read_relative(module: nn.Module, row: Family) -> tuple[LayerSpec, dict[str, Tensor]]:
    """Return the specification of a relative, and its weights under the seed's names, not yet copied.

    Raises:
        CheckpointError: it lacks a weight, has another beside, or its heads are not to be read.
    """
    own = module.state_dict()
    kept = {f"ff.{name}": f"{row.feed_forward}.{name}" for name in _FEED_FORWARD} if row.feed_forward else {}
    for theirs, ours in row.projections.items():
        kept |= {f"{name}.{part}": f"{theirs}.{part}" for name in ours for part in ("weight", "bias")}
    _check_keys(row, set(kept.values()), set(own))
    state = {name: own[key] for name, key in kept.items()}
    heads = getattr(module, row.heads, None)
    inner, dim = state["to_qk.weight"].shape
    if not isinstance(heads, int) or heads < 1 or inner % heads:
        raise CheckpointError(f"{row.title} says its number of heads in {row.heads!r}, which is {heads!r} here; set it")
    spec = LayerSpec(
        dim=dim,
        context_dim=state["context_to_qk.weight"].shape[1],
        heads=heads,
        dim_head=inner // heads,
        norm_eps=_eps(module, row),
        ff_hidden=state["ff.0.weight"].shape[0] if row.feed_forward else None,
        family=row.name,
    )
    return spec, state


def _check_keys(row: Family, wanted: set[str], own: set[str]) -> None:
    if absent := sorted(wanted - own):
        raise CheckpointError(f"{row.title} has {absent[0]}, and this module has not{nearest(absent[0], own)}")
    if unknown := sorted(own - wanted):
        raise CheckpointError(f"it has {unknown[0]}, which {row.title} has not")


def _eps(module: nn.Module, row: Family) -> float:
    norms = (
        [m for m in module.get_submodule(row.feed_forward).modules() if isinstance(m, nn.LayerNorm)] if row.feed_forward else []
    )
    return float(norms[0].eps) if norms else 0.0


class Relative(BidirectionalCrossAttention):
    """A relative as its row says. Called as the seed is, ``mask`` and ``context_mask`` true where real.

    Args:
        spec: a specification whose family is a relative's.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(dim=spec.dim, context_dim=spec.context_dim, heads=spec.heads, dim_head=spec.dim_head)
        self.row = spec.kin
        if self.row.projection_bias:
            for name in ("to_qk", "context_to_qk", "to_v", "context_to_v"):
                plain = cast(nn.Linear, getattr(self, name))
                setattr(self, name, nn.Linear(plain.in_features, plain.out_features, device=plain.weight.device))
        if spec.ff_hidden is not None:
            wide, eps = 2 * spec.dim, spec.norm_eps
            norm = nn.LayerNorm(spec.ff_hidden, eps=eps)
            self.ff = nn.Sequential(nn.Linear(wide, spec.ff_hidden), norm, nn.GELU(), nn.Linear(spec.ff_hidden, spec.dim))

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        return_attn: bool = False,
        rel_pos_bias: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Attend both ways; arguments and results as for the seed's layer, without attention maps.

        Raises:
            InputError: attention maps or a bias, which no relative has.
        """
        if return_attn or rel_pos_bias is not None:
            raise InputError(f"{self.row.title} takes no {'return_attn' if return_attn else 'rel_pos_bias'}")
        sim = self.similarity(x, context)
        out = self._one_way(sim, self._heads(self.context_to_v(context)), mask, context_mask)
        turned = sim.transpose(-1, -2)
        context_out = self._one_way(turned, self._heads(self.to_v(x)), context_mask, mask)
        out, context_out = self.to_out(out), self.context_to_out(context_out)
        return (out, context_out) if self.row.feed_forward is None else (self._added(x, out), self._added(context, context_out))

    def _heads(self, t: Tensor) -> Tensor:
        return t.reshape(*t.shape[:2], self.heads, -1).transpose(1, 2)

    def _added(self, x: Tensor, message: Tensor) -> Tensor:
        added: Tensor = x + self.ff(torch.cat([x, message], -1))
        return added

    def _one_way(self, sim: Tensor, v: Tensor, own: Tensor | None, keys: Tensor | None) -> Tensor:
        """Return what ``[B, H, N, M]`` logits make of ``[B, H, M, D]`` values: ``[B, N, H * D]``."""
        if keys is not None:
            sim = sim.masked_fill(~keys[:, None, None, :], -torch.inf)
        attended = torch.einsum("b h i j, b h j d -> b h i d", sim.softmax(-1), v)
        if self.row.dead_rows == "zero" and keys is not None:
            attended = attended.masked_fill(~keys.any(-1)[:, None, None, None], 0)
        if self.row.own_mask and own is not None:
            attended = attended.masked_fill(~own[:, None, :, None], 0)
        return attended.transpose(1, 2).flatten(-2)
