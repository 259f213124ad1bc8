"""One small model for every way to write the layer's call, and copies of the layer that are it or are not.

The copies come from the proof's own tests. ``around`` puts one into a model.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (its name everywhere)
from bidirectional_cross_attention import BidirectionalCrossAttention as Published
from bidirectional_cross_attention import BidirectionalCrossAttentionTransformer as Transformer
from support.layers import SMALL
from support.models import SHORT, Kind, dims, pairs_of
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from bca_deploy.layers.reference import BidirectionalCrossAttention

DIM, CONTEXT_DIM, HEADS = SMALL["dim"], SMALL["context_dim"], SMALL["heads"]
MASKS = ("mask", "context_mask")

Body = Callable[..., Any]
Parts = Callable[[], Mapping[str, Any]]


class Calling(nn.Module):
    """A model whose forward is one function, called with the model and its inputs."""

    def __init__(self, body: Body, parts: Mapping[str, Any]) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None, context_mask: Tensor | None = None) -> Any:
        return self.body(self, x, context, mask, context_mask)


def layer(**changes: Any) -> nn.Module:
    return Published(**{**SMALL, **changes})


def form(
    name: str,
    body: Body,
    parts: Parts = lambda: {"layer": layer()},
    *,
    masks: tuple[str, ...] = MASKS,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    **about: Any,
) -> Kind:
    """Make one; ``masks``: those that it uses, so that no input goes nowhere."""
    inputs = {name: given for name, given in pairs_of(DIM, CONTEXT_DIM).items() if name not in MASKS or name in masks}
    made = {"layers": ("layer",), **about}
    return Kind(name, lambda: wrap(Calling(body, parts())), inputs, dims(x_len=SHORT, context_len=SHORT), **made)


def around(made: Callable[[], nn.Module]) -> Kind:
    """Put a layer of ``SMALL`` into a model."""
    return form("around", _positional, lambda: {"layer": made()})


# ---- calls that take more than a line


def _positional(model, x, context, mask, context_mask):  # type: ignore[no-untyped-def]
    return model.layer(x, context, mask, context_mask)


def _unpacked(model, x, context, mask, context_mask):  # type: ignore[no-untyped-def]
    given = {"context_mask": context_mask, "mask": mask}
    return model.layer(x, context=context, **{name: value for name, value in given.items() if value is not None})


def _from_lengths(model, x, context, mask, context_mask):  # type: ignore[no-untyped-def]
    lengths = mask.sum(dim=1, keepdim=True)
    return model.layer(x, context, torch.arange(x.shape[1]).unsqueeze(0) < lengths, context_mask)


def _token_in_front(model, x, context, mask, context_mask):  # type: ignore[no-untyped-def]
    x = torch.cat([model.token.expand(x.shape[0], -1, -1), x], dim=1)
    out, context_out = model.layer(x, context, F.pad(mask, (1, 0), value=True), context_mask)
    return out[:, 0], context_out


def _bias_computed(model, x, context, mask, context_mask):  # type: ignore[no-untyped-def]
    bias = (x[..., :5] @ context[..., :5].transpose(1, 2)).unsqueeze(1).expand(-1, HEADS, -1, -1)
    return model.layer(x, context, mask, context_mask, rel_pos_bias=bias)


def _bias_sliced(model, x, context, mask, context_mask):  # type: ignore[no-untyped-def]
    return model.layer(x, context, mask, context_mask, False, model.bias[:, : x.shape[1], : context.shape[1]])


def _twice(model, x, context, mask, context_mask):  # type: ignore[no-untyped-def]
    delta, context_delta = model.layer(x, context, mask, context_mask)
    return model.layer(x + delta, context + context_delta, mask=mask)  # the second time with another call


def _maps_used(model, x, context, mask, context_mask):  # type: ignore[no-untyped-def]
    out, context_out, attn, context_attn = model.layer(x, context, mask, context_mask, return_attn=True)
    return out, context_out, attn.amax(dim=1), context_attn.sum(dim=-1)


def _maps_dropped(model, x, context, mask, context_mask):  # type: ignore[no-untyped-def]
    out, context_out, _, _ = model.layer(x, context, mask, context_mask, True)
    return out, context_out


def _one_map_used(model, x, context, mask, context_mask):  # type: ignore[no-untyped-def]
    out, _, attn, _ = model.layer(x, context, mask, context_mask, return_attn=True)
    return {"out": out, "attn": attn}


def _without_autocast(model, x, context, mask, context_mask):  # type: ignore[no-untyped-def]
    with torch.autocast("cpu", enabled=False):
        return model.layer(x.float(), context.float(), mask, context_mask)


def _without_gradient(model, x, context, mask, context_mask):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return model.layer(x, context, mask, context_mask)


def _checkpointed(model, x, context, mask, context_mask):  # type: ignore[no-untyped-def]
    return checkpoint(model.layer, x, context, mask, context_mask, use_reentrant=False)


def _under_two_names(model, x, context, mask, context_mask):  # type: ignore[no-untyped-def]
    return model.second(*model.layer(x, context, mask, context_mask), mask, context_mask)


def _shared() -> dict[str, nn.Module]:
    one = layer()
    return {"layer": one, "second": one}


def _with(**more: Callable[[], Any]) -> Parts:
    return lambda: {"layer": layer(), **{name: make() for name, make in more.items()}}


def _only(make: Callable[[], nn.Module]) -> Parts:
    return lambda: {"layer": make()}


_BOTH = [
    form("positional", _positional),
    form(
        "keywords, turned round",
        lambda m, x, c, mask, other: m.layer(context=c, context_mask=other, x=x, mask=mask),
        _only(lambda: layer(prenorm=True)),
    ),
    form("unpacked", _unpacked),
    form("mask of one for all", lambda m, x, c, mask, other: m.layer(x, c, mask[:1], other[:1])),
    form("mask of every item", lambda m, x, c, mask, other: m.layer(x, c, mask[:, :1], other[:, -1:])),
    form("mask from lengths", _from_lengths),
    form("mask from float", lambda m, x, c, mask, other: m.layer(x, c, mask.float().bool(), other.float() > 0.5)),
    form("token in front", _token_in_front, _with(token=lambda: nn.Parameter(torch.randn(1, 1, DIM)))),
    form("bias computed", _bias_computed),
    form("bias sliced", _bias_sliced, _with(bias=lambda: nn.Parameter(torch.randn(HEADS, 12, 12)))),
    form("called twice", _twice),
    form("under two names", _under_two_names, _shared),
    form(
        "in a list",
        lambda m, x, c, mask, other: m.layers[0](x, c, mask, other),
        lambda: {"layers": nn.ModuleList([layer()])},
        layers=("layers.0",),
    ),
    form("maps used", _maps_used, literal=("layer",)),
    form("maps dropped", _maps_dropped),
    form("one map used", _one_map_used, literal=("layer",)),
    form("weights read", lambda m, x, c, mask, other: (*m.layer(x, c, mask, other), m.layer.to_qk.weight.sum())),
    form("checkpointed", _checkpointed),
    form("autocast off", _without_autocast),
    form("no gradient", _without_gradient),
    form("talking heads", _positional, _only(lambda: layer(talking_heads=True))),
    form("dropout", _positional, _only(lambda: layer(dropout=0.1))),
    form("transformer", _positional, _only(lambda: Transformer(**SMALL, depth=2, final_norms=False))),
    form("compiled layer", _positional, _only(lambda: torch.compile(layer()))),
    form("data parallel layer", _positional, _only(lambda: nn.DataParallel(layer()))),
    form("averaged whole", _positional, wrap=AveragedModel),
    form("compiled whole", _positional, wrap=torch.compile),
]
_FEWER = [
    form("no masks", lambda m, x, c, *_: m.layer(x, c), masks=()),
    form("mask alone", lambda m, x, c, mask, _: m.layer(x, c, mask), masks=("mask",)),
    form("context mask alone", lambda m, x, c, _, other: m.layer(x, c, context_mask=other), masks=("context_mask",)),
    form("mask of ones", lambda m, x, c, *_: m.layer(x, c, torch.ones(1, 1, dtype=torch.bool)), masks=()),
    form("mask of zeros", lambda m, x, c, *_: m.layer(x, c, torch.zeros(1, 1, dtype=torch.bool)), masks=()),
    form("mask from values", lambda m, x, c, _, other: m.layer(x, c, x[..., 0] != 0, other), masks=("context_mask",)),
]
FORMS: dict[str, Kind] = {made.name: made for made in (*_BOTH, *_FEWER)}


# ---- copies


def _copied(**changes: Callable[..., Any]) -> nn.Module:
    from whole.test_proof import copied  # here: it has tests

    return copied(**changes)


def _small() -> nn.Module:
    from whole.test_proof import layer as proven

    return proven()


class OtherNames(BidirectionalCrossAttention):
    def forward(self, this, that, x_mask=None, ctx_mask=None):  # type: ignore[no-untyped-def, override]
        return super().forward(this, that, x_mask, ctx_mask)


class OneMore(BidirectionalCrossAttention):
    def forward(self, x, context, mask=None, context_mask=None, *, verbose=False):  # type: ignore[no-untyped-def, override]
        return super().forward(x, context, mask, context_mask)


def _as(subclass: type[nn.Module]) -> nn.Module:
    made = _small()
    made.__class__ = subclass
    return made


def _hooked() -> nn.Module:
    made = _small()
    made.register_forward_hook(lambda module, args, outputs: (outputs[0] * 2, *outputs[1:]))
    return made


class Tripled(BidirectionalCrossAttention):
    def forward(self, *args, **given):  # type: ignore[no-untyped-def, override]
        out, *others = super().forward(*args, **given)
        return out * 3, *others


def _without_dropout() -> nn.Module:
    made = _copied()
    del made.dropout, made.context_dropout
    return made


def _stable() -> nn.Module:
    from whole.test_proof import stable

    return _copied(softmax=stable)


#: What has the layer's weights and is another function.
BROKEN: dict[str, Callable[[], nn.Module]] = {
    "fill of -inf": lambda: _copied(fill=lambda sim: -torch.inf),
    "fill of -1e4": lambda: _copied(fill=lambda sim: -1e4),
    "another scale": lambda: _copied(softmax=lambda sim, dim: (sim / 2).softmax(dim)),
    "clamp": lambda: _copied(softmax=lambda sim, dim: sim.clamp(-50, 50).softmax(dim)),
    "zeros at dead rows": lambda: _copied(after=lambda out, live: out * live),
    "forward hook": _hooked,
    "forward overridden": lambda: _as(Tripled),
}
#: What is written otherwise and is the layer.
RIGHT: dict[str, Callable[[], nn.Module]] = {
    "no dropout": _without_dropout,
    "other argument names": lambda: _as(OtherNames),
    "one argument more": lambda: _as(OneMore),
    "softmax less its maximum": _stable,
}
