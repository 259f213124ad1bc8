"""The swapped copy of a model is the model, however it calls its layers; the model itself stays as it was."""

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.forms import FORMS, RIGHT, around, form
from support.models import KINDS, Kind
from torch import Tensor, nn

from bca_deploy.errors import ExportError, InputError
from bca_deploy.layers.checkpoint import from_module
from bca_deploy.layers.isolation import one_thread
from bca_deploy.layers.reference import BidirectionalCrossAttention
from bca_deploy.whole.calls import call_of
from bca_deploy.whole.find import Found, find
from bca_deploy.whole.proof import Proof
from bca_deploy.whole.samples import named_outputs
from bca_deploy.whole.swap import Swapped, plain_copy, swap, tap_name
from bca_deploy.whole.uses import Use, uses_of


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """What torch.compile has wrapped runs as it is: these are forms of a model, not of PyTorch's kernels."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), one_thread():
        yield


def found(plain: nn.Module, *paths: str) -> list[Found]:
    """The layers at these places, unproven: that is find's, and takes most of the time."""
    modules = {path: plain.get_submodule(path) for path in paths}
    return [Found(path, from_module(each), call_of(each), Proof(0, 0.0, ())) for path, each in modules.items()]


def swapped(kind: Kind) -> tuple[Swapped, dict[str, Use]]:
    plain = plain_copy(kind.make())
    founds = found(plain, *kind.layers)
    uses = uses_of(plain, founds, kind.pair()[0])
    return swap(plain, founds, uses, "fp32", "portable"), uses


def inputs(kind: Kind, which: str, dead: bool) -> dict[str, Tensor]:
    """A sample, with every way to be dead: the first item in the first mask, the second in the second, the third in both."""
    given = kind.sample(3, {**kind.sizes()[which], "batch": 4})
    masks = [name for name, tensor in given.items() if tensor.dtype == torch.bool or name in kind.masks]
    for index, name in enumerate(masks if dead else ()):
        given[name][index % 2] = 0
        given[name][2] = 0
    return given


def held(ours: nn.Module, theirs: nn.Module, given: dict[str, Tensor]) -> None:
    """Hold the outputs against each other: float32, each of a few hundred rounded numbers."""
    got, wanted = (named_outputs(model(**copy.deepcopy(given))) for model in (ours, theirs))
    assert list(got) == list(wanted)
    for name, true in wanted.items():
        assert (got[name].dtype, got[name].shape) == (true.dtype, true.shape)
        torch.testing.assert_close(got[name], true, atol=3e-6 * max(1.0, float(true.double().abs().max())), rtol=0)


ALL = [*FORMS.values(), *(kind for name, kind in KINDS.items() if name != "bert")]
COPIES = [around(made) for made in RIGHT.values()]


@pytest.mark.parametrize("kind", [*ALL, *COPIES], ids=[*(kind.name for kind in ALL), *(f"a copy: {name}" for name in RIGHT)])
def test_the_swapped_model_is_the_untouched_one_at_every_size_and_at_dead_rows(kind: Kind) -> None:
    model = kind.make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made, uses = swapped(kind)
    assert tuple(uses) == made.paths == kind.layers
    assert tuple(path for path, use in uses.items() if use.maps) == kind.literal
    for which in ("min", "odd", "even", "equal", "unequal"):
        for dead in (False, True):
            held(made.model, model, inputs(kind, which, dead))
            made.check_called()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ---- how a layer is used


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("positional", Use(1, masked=True, biased=False, maps=False)),
        ("no masks", Use(1, masked=False, biased=False, maps=False)),
        ("mask of ones", Use(1, masked=True, biased=False, maps=False)),
        ("bias computed", Use(1, masked=True, biased=True, maps=False)),
        ("maps used", Use(1, masked=True, biased=False, maps=True)),
        ("one map used", Use(1, masked=True, biased=False, maps=True)),
        ("maps dropped", Use(1, masked=True, biased=False, maps=False)),
        ("called twice", Use(2, masked=True, biased=False, maps=False)),
        ("under two names", Use(2, masked=True, biased=False, maps=False)),
        ("in a list", Use(1, masked=True, biased=False, maps=False)),
    ],
)
def test_how_a_layer_is_used_is_found_out_by_running(name: str, use: Use) -> None:
    _, uses = swapped(FORMS[name])
    assert list(uses.values()) == [use]


@pytest.mark.parametrize(
    ("name", "lowering", "cpu"),
    [
        ("positional", "fused", True),
        ("maps dropped", "fused", True),
        ("maps used", "reference", False),
        ("talking heads", "reference", False),
        ("bias sliced", "fused", False),
    ],
)
def test_the_form_of_a_layer_follows_from_its_use(name: str, lowering: str, cpu: bool) -> None:
    plain = plain_copy(FORMS[name].make())
    (layer,) = found(plain, "layer")
    use = uses_of(plain, [layer], FORMS[name].pair()[0])["layer"]
    assert (use.lowering(layer), use.has_cpu_form(layer)) == (lowering, cpu)


def _maps_seen(seen: Callable[[Tensor], Tensor]) -> Kind:
    def body(model: Any, x: Tensor, context: Tensor, mask: Tensor, context_mask: Tensor) -> Any:
        out, context_out, attn, _ = model.layer(x, context, mask, context_mask, return_attn=True)
        return out, context_out, seen(attn)

    return form("maps seen", body)


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param(lambda attn: attn > 0.98, id="only where one is large"),
        pytest.param(lambda attn: attn.argmax(-1), id="the place of the largest"),
        pytest.param(lambda attn: attn.nan_to_num(0).sum(), id="without its NaN"),
        pytest.param(lambda attn: (attn * 0.2).round(), id="rounded"),
    ],
)
def test_maps_that_show_only_at_some_values_are_used(seen: Callable[[Tensor], Tensor]) -> None:
    made, uses = swapped(kind := _maps_seen(seen))
    assert uses["layer"].maps
    held(made.model, kind.make(), inputs(kind, "min", dead=True))


def test_maps_of_which_only_the_shape_counts_are_not_used() -> None:
    made, uses = swapped(kind := _maps_seen(lambda attn: torch.zeros(attn.shape[-2:]) + 1))
    assert not uses["layer"].maps
    held(made.model, kind.make(), inputs(kind, "odd", dead=True))


# ---- taps and calls


def test_what_each_call_gave_is_tapped_in_order() -> None:
    made, _ = swapped(kind := FORMS["called twice"])
    outputs = named_outputs(made.model(**kind.pair()[0]))
    assert list(made.taps.tensors) == [tap_name("layer", n, out) for n in (0, 1) for out in ("out", "context_out")]
    assert torch.equal(made.taps.tensors["layer/1/out"], outputs["output_0"])
    assert not torch.equal(made.taps.tensors["layer/0/out"], outputs["output_0"])


def test_a_layer_that_is_never_called_is_refused_by_name() -> None:
    body = lambda m, x, c, *masks: m.layer(x, c, *masks)  # noqa: E731
    kind = form("idle", body, lambda: {"layer": small(), "idle": small()}, layers=("layer", "idle"))
    made, uses = swapped(kind)
    assert uses["idle"].calls == 0
    made.model(**kind.pair()[0])
    with pytest.raises(ExportError, match=r"^idle was found and proven, and forward never called it .*: --keep-literal idle$"):
        made.check_called()


def small() -> nn.Module:
    return BidirectionalCrossAttention(dim=24, context_dim=16, heads=3, dim_head=8)


def test_a_layer_that_is_called_past_its_forward_is_not_taken_for_called() -> None:
    body = lambda m, x, c, *masks: type(m.layer).forward(m.layer, x, c, *masks) if m.direct else m.layer(x, c, *masks)  # noqa: E731
    kind = form("direct", body, lambda: {"layer": small(), "direct": True})
    plain = plain_copy(kind.make())
    assert uses_of(plain, found(plain, "layer"), kind.pair()[0])["layer"].calls == 0


# ---- what is read from outside, and who calls how


def test_weights_and_attributes_are_read_from_outside_and_are_not_a_second_time_in_the_model() -> None:
    made, _ = swapped(kind := FORMS["weights read"])
    stand_in = made.model.get_submodule("layer")
    original = kind.make().get_submodule("layer")
    assert torch.equal(stand_in.to_qk.weight, original.to_qk.weight)
    assert stand_in.heads == original.heads
    assert not any("_original" in name for name, _ in made.model.named_parameters())
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = stand_in.no_such_thing


def test_a_swapped_model_can_be_copied() -> None:
    made, _ = swapped(kind := FORMS["positional"])
    held(copy.deepcopy(made.model), kind.make(), kind.pair()[0])


class HandingOn(BidirectionalCrossAttention):
    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def, override]
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x, c, mask, other: m.layer(x, c, mask, other),
        lambda m, x, c, mask, other: m.layer(x, c, context_mask=other, mask=mask),
        lambda m, x, c, mask, other: m.layer(x=x, context=c, mask=mask, context_mask=other),
    ],
)
def test_a_layer_that_hands_its_arguments_on_is_called_as_it_was(call: Callable[..., Any]) -> None:
    kind = form("handing on", call, lambda: {"layer": HandingOn(dim=24, context_dim=16, heads=3, dim_head=8)})
    made, uses = swapped(kind)
    assert uses["layer"] == Use(1, masked=True, biased=False, maps=False)
    held(made.model, kind.make(), inputs(kind, "odd", dead=True))


def test_one_layer_under_two_names_stays_one() -> None:
    made, _ = swapped(FORMS["under two names"])
    assert made.model.get_submodule("layer") is made.model.get_submodule("second")


def test_a_model_that_is_the_layer_is_its_stand_in() -> None:
    layer = BidirectionalCrossAttention(dim=24, context_dim=16, heads=3, dim_head=8).eval()
    plain = plain_copy(layer)
    given = FORMS["positional"].pair()[0]
    founds = found(plain, "")
    made = swap(plain, founds, uses_of(plain, founds, given), "fp32", "portable")
    held(made.model, layer, given)
    made.check_called()
    assert list(made.taps.tensors) == ["/0/out", "/0/context_out"]


# ---- the user's model


@pytest.mark.parametrize("name", ["dropout", "compiled layer", "compiled whole", "averaged whole", "data parallel layer"])
def test_the_user_s_model_and_process_are_left_alone(name: str) -> None:
    kind = FORMS[name]
    model = kind.make().train()
    modules, modes = list(model.modules()), [each.training for each in model.modules()]
    given = kind.pair()[0]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    torch.set_default_dtype(torch.float64)
    try:
        plain = plain_copy(model)
        founds = find(plain)
        swap(plain, founds, uses_of(plain, founds, given), "fp32", "portable")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    assert [*map(id, model.modules())] == [*map(id, modules)]
    assert [each.training for each in model.modules()] == modes
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == kept and torch.equal(after[name], tensor) for name, (kept, tensor) in before.items())
    assert not any(each._forward_hooks for each in (*model.modules(), *plain.modules()))


def test_a_plain_copy_is_in_eval_mode_and_float32_without_wrappers() -> None:
    made = torch.compile(nn.DataParallel(FORMS["compiled layer"].make().double().train()))
    plain = plain_copy(made)
    assert not any(hasattr(each, "_orig_mod") or isinstance(each, nn.DataParallel) for each in plain.modules())
    assert not any(each.training for each in plain.modules())
    assert {tensor.dtype for tensor in plain.parameters()} == {torch.float32}


def test_a_layer_under_two_names_that_a_wrapper_holds_stays_one() -> None:
    wrapped = torch.compile(small())
    plain = plain_copy(nn.ModuleDict({"first": wrapped, "second": wrapped}))
    assert plain["first"] is plain["second"]
    assert type(plain["first"]) is BidirectionalCrossAttention


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = FORMS["positional"].make()
    model.lock = threading.Lock()
    with pytest.raises(InputError, match=r"the model cannot be copied: cannot pickle '_thread.lock' object"):
        plain_copy(model)


def test_a_model_that_works_in_place_does_not_change_the_sample() -> None:
    kind = form("in place", lambda m, x, c, *masks: m.layer(x.mul_(2), c, *masks))
    given = kind.pair()[0]
    before = copy.deepcopy(given)
    plain = plain_copy(kind.make())
    uses_of(plain, found(plain, "layer"), given)
    assert all(torch.equal(before[name], tensor) for name, tensor in given.items())
