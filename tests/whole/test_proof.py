"""A module with the layer's weights is the layer only where it computes the same, in each corner where copies differ."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.layers import make_checkpoint
from torch import Tensor, nn

from bca_deploy.errors import CheckpointError, ParityError
from bca_deploy.layers import reference
from bca_deploy.layers.checkpoint import from_module
from bca_deploy.layers.reference import BidirectionalCrossAttention
from bca_deploy.spec import Interface
from bca_deploy.whole.calls import call_of, unwrapped
from bca_deploy.whole.proof import check, prove

ALL = Interface(rel_pos_bias="shared", attention_maps=True)


def layer(**changes: Any) -> BidirectionalCrossAttention:
    return make_checkpoint(**{"prenorm": True, **changes}).module(torch.float32)  # type: ignore[return-value]


class Copy(BidirectionalCrossAttention):
    """A copy of the layer, as repositories have it, whose parts can be changed one by one."""

    fill = staticmethod(lambda sim: -torch.finfo(sim.dtype).max)
    softmax = staticmethod(lambda sim, dim: sim.softmax(dim))
    after = staticmethod(lambda out, live: out)

    def forward(self, x, context, mask=None, context_mask=None, return_attn=False, rel_pos_bias=None):  # type: ignore[no-untyped-def, override]
        heads = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        x, context = self.norm(x), self.context_norm(context)
        sim = self.similarity(x, context, rel_pos_bias)
        mine = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        other = torch.ones(context.shape[:2], dtype=torch.bool) if context_mask is None else context_mask
        both = mine[:, None, :, None] & other[:, None, None, :]
        sim = sim.masked_fill(~both, self.fill(sim))
        attn, turned = (self.softmax(sim, dim) for dim in (-1, -2))
        attn, turned = self.talking_heads(attn), self.context_talking_heads(turned)
        out = self.after(attn @ heads(self.context_to_v(context)), both.any(-1, keepdim=True))
        context_out = self.after(turned.transpose(-1, -2) @ heads(self.to_v(x)), both.any(-2).unsqueeze(-1))
        merged = [self.to_out(out.transpose(1, 2).flatten(-2)), self.context_to_out(context_out.transpose(1, 2).flatten(-2))]
        return (*merged, attn, turned) if return_attn else tuple(merged)


def copied(**changes: Callable[..., Any]) -> Copy:
    made = copy.deepcopy(layer())
    made.__class__ = type("Changed", (Copy,), {name: staticmethod(change) for name, change in changes.items()})
    return made  # type: ignore[return-value]


def stable(sim: Tensor, dim: int) -> Tensor:
    powers = (sim - sim.amax(dim, keepdim=True)).exp()
    return powers / powers.sum(dim, keepdim=True)


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(layer, id="the reference"),
        pytest.param(lambda: layer(norm="rms", talking_heads=True), id="talking heads"),
        pytest.param(lambda: layer(heads=1), id="one head"),
        pytest.param(lambda: layer(prenorm=False), id="no norm"),
        pytest.param(copied, id="a copy"),
        pytest.param(lambda: copied(softmax=stable), id="a softmax that takes the maximum off"),
        pytest.param(lambda: layer().half(), id="half weights"),
        pytest.param(lambda: layer().train(), id="in training"),
    ],
)
def test_the_layer_is_proven_in_every_combination(module: Callable[[], nn.Module]) -> None:
    made = module()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    proof = prove(made, from_module(made), ALL)
    assert proof.differences == ()
    assert proof.cases == 4 * 16
    assert proof.worst < 1e-10
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())


def test_a_transformer_is_proven_with_its_masks() -> None:
    made = make_checkpoint(depth=2, norm="rms", prenorm=True, ff_hidden=48, context_ff_hidden=32).module(torch.float32)
    proof = prove(made, from_module(made), Interface())
    assert (proof.differences, proof.cases) == ((), 4 * 4)


@pytest.mark.parametrize(
    ("module", "difference"),
    [
        pytest.param(lambda: copied(fill=lambda sim: -torch.inf), "in rows that have no live key", id="fill of -inf"),
        pytest.param(lambda: copied(fill=lambda sim: -1e4), r"\|logit\| 100000, opposed tokens: ", id="fill of -10000"),
        pytest.param(
            lambda: copied(after=lambda out, live: out * live), "in rows that have no live key", id="zeros at dead rows"
        ),
        pytest.param(
            lambda: copied(softmax=lambda sim, dim: sim.clamp(-50, 50).softmax(dim)), r"\|logit\| 20000", id="a clamp"
        ),
        pytest.param(
            lambda: copied(softmax=lambda sim, dim: (sim / 2).softmax(dim)), r"\|logit\| 1: .* in live rows", id="a scale"
        ),
        pytest.param(lambda: copied(softmax=lambda sim, dim: 1 / 0), "ZeroDivisionError: division by zero", id="an error"),
    ],
)
def test_a_copy_that_differs_is_refused_with_the_case(module: Callable[[], nn.Module], difference: str) -> None:
    made = module()
    with pytest.raises(ParityError, match=rf"computes something else \(\d+ differences in 16 cases, the first: .*{difference}"):
        check(made, from_module(made), Interface())


def test_a_hook_that_changes_the_outputs_is_seen() -> None:
    made = layer()
    made.register_forward_hook(lambda module, args, outputs: (outputs[0] + 1, *outputs[1:]))
    with pytest.raises(ParityError, match=r"no mask, \|logit\| 1: out differs by .* in live rows"):
        check(made, from_module(made), Interface())


def test_what_only_an_input_that_is_not_exported_would_show_is_no_difference() -> None:
    made = copied(fill=lambda sim: -torch.inf)
    check(made, from_module(made), Interface(mask=False, context_mask=False))


def test_an_epsilon_that_depends_on_the_precision_is_float32s() -> None:
    made = layer(norm="rms")
    for name in ("norm", "context_norm"):
        norm = nn.RMSNorm(getattr(made, name).weight.numel())
        norm.load_state_dict(getattr(made, name).state_dict())
        setattr(made, name, norm)
    check(made, from_module(made), Interface())


# ---- how a module is called


class Renamed(BidirectionalCrossAttention):
    def forward(self, y, ctx, *, ctx_mask=None, x_mask=None, scale_by=1.0):  # type: ignore[no-untyped-def, override]
        return super().forward(y, ctx, x_mask, ctx_mask)


class HandingOn(BidirectionalCrossAttention):
    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def, override]
        return super().forward(*args, **kwargs)


class Needy(BidirectionalCrossAttention):
    def forward(self, x, context, temperature):  # type: ignore[no-untyped-def, override]
        return super().forward(x, context)


def test_arguments_of_other_names_and_orders_are_found() -> None:
    made = layer()
    made.__class__ = Renamed
    assert dict(call_of(made).arguments) == {"x": "y", "context": "ctx", "context_mask": "ctx_mask", "mask": "x_mask"}
    check(made, from_module(made), Interface())
    with pytest.raises(CheckpointError, match="forward takes no rel_pos_bias, and the export is to have it; export without"):
        check(made, from_module(made), Interface(rel_pos_bias="shared"))


def test_what_hands_its_arguments_on_is_called_as_the_layer_is() -> None:
    made = layer()
    made.__class__ = HandingOn
    check(made, from_module(made), ALL)


def test_an_argument_that_the_layer_has_not_is_named() -> None:
    made = layer()
    made.__class__ = Needy
    with pytest.raises(CheckpointError, match="the module's forward needs 'temperature', which this layer has not"):
        call_of(made)


def test_what_wraps_a_module_is_taken_off() -> None:
    made = layer()
    for wrapped in (torch.compile(made), nn.DataParallel(made), torch.compile(nn.DataParallel(made))):
        assert unwrapped(wrapped) is made
    averaged = torch.optim.swa_utils.AveragedModel(made)
    assert unwrapped(averaged) is averaged.module
    assert isinstance(unwrapped(averaged), reference.BidirectionalCrossAttention)
