"""The models that the tests export run in PyTorch first, at every size that they are declared for."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.forms import BROKEN, FORMS, RIGHT, around
from support.models import KINDS, Kind
from torch import Tensor, nn

from bca_deploy.layers.checkpoint import from_module
from bca_deploy.layers.isolation import one_thread
from bca_deploy.spec import Interface
from bca_deploy.whole.calls import unwrapped
from bca_deploy.whole.proof import prove


def leaves(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if dataclasses.is_dataclass(output):
        output = list(vars(output).values())
    values = output.values() if isinstance(output, dict) else output or ()
    return [leaf for value in values for leaf in leaves(value)]


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """What torch.compile has wrapped runs as it is: these are forms of a model, not of PyTorch's kernels."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), one_thread():
        yield


MODELS = [pytest.param(kind, id=name, marks=pytest.mark.slow if name == "bert" else ()) for name, kind in KINDS.items()]
MODELS += [pytest.param(kind, id=name) for name, kind in FORMS.items()]


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_runs_at_every_size_and_gives_the_same_again(kind: Kind) -> None:
    model, again = kind.make(), kind.make()
    for sizes in kind.sizes().values():
        given = kind.sample(0, sizes)
        outputs = leaves(model(**given))
        assert outputs
        assert all(output.isfinite().all() for output in outputs)
        for other in (model(**given), again(**kind.sample(0, sizes))):
            assert all(torch.equal(*pair) for pair in zip(outputs, leaves(other), strict=True))


@pytest.mark.parametrize("kind", MODELS)
def test_samples_share_what_the_axes_say_and_nothing_else(kind: Kind) -> None:
    one, other = kind.pair()
    assert all(low <= opt <= high for low, opt, high in kind.dims.values())
    assert one.keys() == other.keys() == kind.axes.keys()
    seen: dict[tuple[int, int], set[str | None]] = {}
    for name, axes in kind.axes.items():
        sizes = list(zip(one[name].shape, other[name].shape, axes, strict=True))
        assert all((a != b) == (axis is not None) for a, b, axis in sizes)
        for a, b, axis in sizes:
            seen.setdefault((a, b), set()).add(axis)
    assert all(len(names) == 1 for names in seen.values())
    assert set().union(*seen.values()) - {None} == set(kind.dims)


@pytest.mark.parametrize("kind", MODELS)
def test_the_layers_are_where_they_are_said_to_be(kind: Kind) -> None:
    model = unwrapped(kind.make())
    for path in kind.layers:
        assert from_module(unwrapped(model.get_submodule(path))).spec.heads > 1
    assert set(kind.literal) <= set(kind.layers)


@pytest.mark.parametrize("kind", MODELS)
def test_items_that_are_all_padding_give_numbers(kind: Kind) -> None:
    given = kind.sample(0, kind.sizes()["odd"])
    for mask in (given[name] for name in given if given[name].dtype == torch.bool or name in kind.masks):
        mask[0] = 0
    assert all(output.isfinite().all() for output in leaves(kind.make()(**given)))


def test_making_and_drawing_leave_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    KINDS["encoders"].make()
    KINDS["encoders"].pair()
    assert torch.equal(before, torch.get_rng_state())


# ---- copies of the layer


def differences(made: Callable[[], nn.Module]) -> int:
    module = made()
    return len(prove(module, from_module(module), Interface()).differences)


@pytest.mark.parametrize("made", [pytest.param(made, id=name) for name, made in RIGHT.items()])
def test_a_right_copy_is_the_layer(made: Callable[[], nn.Module]) -> None:
    assert differences(made) == 0
    kind = around(made)
    assert all(output.isfinite().all() for output in leaves(kind.make()(**kind.pair()[0])))


@pytest.mark.parametrize("made", [pytest.param(made, id=name) for name, made in BROKEN.items()])
def test_a_broken_copy_is_not_the_layer_and_runs(made: Callable[[], nn.Module]) -> None:
    assert differences(made) > 0
    kind = around(made)
    assert [output.ndim for output in leaves(kind.make()(**kind.pair()[0]))] == [3, 3]
