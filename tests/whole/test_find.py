"""The layers of a model: found by their parameters, taken for what they do, refused with the way out."""

import copy
from collections.abc import Callable

import pytest
import torch
from support.forms import BROKEN, FORMS, RIGHT, around
from support.layers import SMALL
from support.models import KINDS, Kind
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from bca_deploy.errors import CheckpointError, InputError, ParityError
from bca_deploy.layers.reference import BidirectionalCrossAttention
from bca_deploy.whole.find import find
from bca_deploy.whole.swap import plain_copy


class Model(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        for name, each in layers.items():
            setattr(self, name, each)


def layer() -> BidirectionalCrossAttention:
    return BidirectionalCrossAttention(**SMALL).eval()


# ---- accepted


@pytest.mark.parametrize("kind", [kind for name, kind in KINDS.items() if name != "bert"], ids=lambda kind: kind.name)
def test_the_layers_of_every_kind_of_model_are_found_and_proven(kind: Kind) -> None:
    found = find(plain_copy(kind.make()))
    assert tuple(each.path for each in found) == kind.layers
    assert all(each.proof.differences == () and each.proof.cases >= 16 for each in found)


@pytest.mark.parametrize("made", RIGHT.values(), ids=RIGHT)
def test_a_copy_that_is_written_otherwise_is_the_layer(made: Callable[[], nn.Module]) -> None:
    assert [each.path for each in find(around(made).make())] == ["layer"]


def test_a_layer_under_two_names_is_found_once() -> None:
    one = layer()
    assert [each.path for each in find(Model(first=one, second=one, third=layer()))] == ["first", "third"]


def test_a_model_that_is_the_layer_has_an_empty_path() -> None:
    assert [each.path for each in find(layer())] == [""]


def test_of_a_transformer_the_outermost_is_found() -> None:
    model = Model(fusion=FORMS["transformer"].make().get_submodule("layer"), layer=layer())
    assert [(each.path, each.checkpoint.spec.depth) for each in find(model)] == [("fusion", 2), ("layer", None)]


def test_the_model_is_left_as_it_was() -> None:
    model = Model(layer=layer().train())
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    find(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.get_submodule("layer").training
    assert torch.equal(state, torch.get_rng_state())


# ---- refused


@pytest.mark.parametrize(
    ("made", "case"),
    [
        pytest.param(made, case, id=name)
        for (name, made), case in zip(
            BROKEN.items(),
            [
                "in rows that have no live key",
                r"\|logit\| 100000, opposed tokens: ",
                r"no mask, \|logit\| 1: .* in live rows",
                r"no mask, \|logit\| 20000: ",
                "in rows that have no live key",
                r"no mask, \|logit\| 1: .* in live rows",
                r"no mask, \|logit\| 1: .* in live rows",
            ],
            strict=True,
        )
    ],
)
def test_another_function_is_refused_with_the_case_and_the_way_out(made: Callable[[], nn.Module], case: str) -> None:
    model = around(made).make()
    with pytest.raises(ParityError, match=f"^layer: .*computes something else .*{case}") as refused:
        find(model)
    assert str(refused.value).endswith("; --keep-literal layer exports it as it is")
    assert find(model, keep_literal=["layer"]) == ()


def test_another_function_that_is_the_whole_model_has_no_way_out() -> None:
    with pytest.raises(ParityError, match=r"^the model: ") as refused:
        find(BROKEN["another scale"]())
    assert "--keep-literal" not in str(refused.value)


class Half(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def parametrised(given: nn.Module) -> None:
    parametrize.register_parametrization(given.to_qk, "weight", Half())


def weight_norm(given: nn.Module) -> None:
    given.to_qk = parametrizations.weight_norm(given.to_qk)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def old_weight_norm(given: nn.Module) -> None:
    given.to_qk = nn.utils.weight_norm(given.to_qk)


class Quantised(nn.Module):
    """As libraries of quantisation make one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", (linear.weight.detach() * 100).to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.get_buffer("qweight") / 100).t()


def quantised(given: nn.Module) -> None:
    given.to_qk = Quantised(given.to_qk)


class Adapted(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.down, self.up = linear, nn.Linear(linear.in_features, 2), nn.Linear(2, linear.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def adapted(given: nn.Module) -> None:
    given.to_qk = Adapted(given.to_qk)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("change", [parametrised, weight_norm, old_weight_norm, quantised, adapted])
def test_weights_that_are_no_plain_ones_are_refused_with_the_advice_to_merge(change: Callable[[nn.Module], None]) -> None:
    model = Model(layer=layer(), other=layer())
    change(model.get_submodule("layer"))
    with pytest.raises(CheckpointError, match=r"layer\.to_qk is a \w+ without a plain weight, .*; merge it first") as refused:
        find(model)
    assert "remove_parametrizations, or merge_and_unload of an adapter" in str(refused.value)
    assert str(refused.value).endswith("--keep-literal layer")
    assert [each.path for each in find(model, keep_literal=["layer"])] == ["other"]


def test_weights_that_are_merged_are_the_layer_s() -> None:
    model = Model(layer=layer())
    parametrised(model.get_submodule("layer"))
    parametrize.remove_parametrizations(model.get_submodule("layer.to_qk"), "weight")
    assert [each.path for each in find(model)] == ["layer"]


def test_weights_that_look_like_the_layer_and_do_not_fit_are_refused_with_the_way_out() -> None:
    model = Model(layer=layer())
    model.get_submodule("layer").more = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"^layer looks like the layer and is not: unknown key more\.bias") as refused:
        find(model)
    assert str(refused.value).endswith("; --keep-literal layer exports it as it is")


def test_without_a_layer_it_is_said_what_was_looked_for() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"no bidirectional cross-attention in this Model: looked for a module with the linear layers of .*to_qk, ",
    ):
        find(Model())
    with pytest.raises(CheckpointError, match="; --allow-none exports the model as it is"):
        find(Model())


def test_a_model_without_a_layer_may_be_allowed() -> None:
    assert find(Model(), allow_none=True) == ()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("lyer", r"--keep-literal lyer: no layer is there \(did you mean 'layer'\?\); found: layer, other"),
        ("encoder", "--keep-literal encoder: no layer is there.*; found: layer, other"),
        ("layer.to_qk", "--keep-literal layer.to_qk: no layer is there"),
    ],
)
def test_a_path_that_leads_to_no_layer_is_refused(path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find(Model(layer=layer(), other=layer()), keep_literal=[path])


def test_a_path_is_refused_where_there_is_no_layer_at_all() -> None:
    with pytest.raises(InputError, match="--keep-literal layer: no layer is there; found: none"):
        find(Model(), keep_literal=["layer"])


def tied_weight() -> nn.Module:
    made = BidirectionalCrossAttention(dim=16, heads=2, dim_head=8).eval()
    made.context_to_qk.weight = made.to_qk.weight
    return made


def tied_module() -> nn.Module:
    made = BidirectionalCrossAttention(dim=16, heads=2, dim_head=8).eval()
    made.context_to_qk = made.to_qk
    return made


@pytest.mark.parametrize("made", [tied_weight, tied_module])
def test_a_layer_whose_sides_share_weights_is_found(made: Callable[[], nn.Module]) -> None:
    assert [each.path for each in find(Model(layer=made()))] == ["layer"]
