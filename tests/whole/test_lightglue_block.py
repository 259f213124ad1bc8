"""LightGlue's block inside a model: found, proven, fused with zeros at dead rows; what is not quite it is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.lightglue_block import (
    DIM,
    HEADS,
    PAIRS,
    Biased,
    CrossBlock,
    Mean,
    OtherScale,
    OwnQueries,
    Rectified,
    Showing,
    ShowingOnDemand,
    TalkingHeads,
    Undefined,
    Unnormalised,
    matching,
)
from support.models import seeded
from torch import Tensor, nn

import bca_deploy
from bca_deploy.errors import CheckpointError, ExportError, InputError, ParityError
from bca_deploy.whole.find import find
from bca_deploy.whole.swap import Swapped, plain_copy, swap
from bca_deploy.whole.uses import uses_of

NAMES = ("no mask", *PAIRS)


def swapped(name: str) -> tuple[nn.Module, Swapped]:
    kind = matching(name)
    model = kind.make()
    plain = plain_copy(model)
    founds = find(plain)
    return model, swap(plain, founds, uses_of(plain, founds, kind.pair()[0]), "fp32", "portable")


def held(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=3e-6 * max(1.0, float(other.abs().max())), rtol=0)


def test_every_block_of_a_model_is_found_and_proven() -> None:
    founds = find(matching("[B,1,N,M]").make())
    assert [found.path for found in founds] == ["blocks.0", "blocks.1"]
    for found in founds:
        spec = found.checkpoint.spec
        assert (spec.family, spec.dim, spec.context_dim, spec.heads, spec.ff_hidden) == ("lightglue", DIM, DIM, HEADS, 2 * DIM)
        assert found.proof.cases >= 16  # four logits, either mask
        assert found.proof.worst < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_the_swapped_model_is_the_untouched_one_at_every_size_and_at_dead_rows(name: str) -> None:
    kind, (model, made) = matching(name), swapped(name)
    assert made.paths == kind.layers
    for which in ("min", "odd", "even", "equal", "unequal"):
        given = kind.sample(3, kind.sizes()[which] | {"batch": min(4, kind.dims["batch"][2])})
        for dead in ((), ("left_mask",), ("right_mask",), ("left_mask", "right_mask")) if name in PAIRS else ((),):
            arrays = given | {mask: given[mask].clone().index_fill(0, torch.tensor([0]), False) for mask in dead}
            with torch.no_grad():
                held(made.model(**arrays), model(**arrays))
            made.check_called()


def test_a_row_that_is_masked_or_has_no_key_hears_the_last_bias_alone() -> None:
    """Zeros before the last projection, so that its bias is what is left."""
    kind, (model, made) = matching("[B,1,N,M]"), swapped("[B,1,N,M]")
    given = kind.sample(0, {"batch": 2, "left_len": 5, "right_len": 4})
    given["left_mask"], given["right_mask"] = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    given["right_mask"][0] = False  # no key for any row on the left
    given["left_mask"][1, 3:] = False  # rows that are masked themselves
    with torch.no_grad():
        left, _ = made.model(**given)
        x = given["left"]
        for block in model.blocks:
            x = x + block.ffn(torch.cat([x, block.to_out.bias.expand_as(x)], -1))
    held((left[0], left[1, 3:]), (x[0], x[1, 3:]))
    assert not torch.allclose(left[1, :3], x[1, :3], atol=1e-2)


def test_what_both_sides_share_is_one_tensor() -> None:
    _, made = swapped("no mask")
    state = made.model.state_dict(keep_vars=True)
    weights = [t for name, t in state.items() if any(part in name for part in ("_qk", "_v", "_out"))]
    assert len(weights) == 2 * 12  # of two blocks: six layers' weights and biases by name
    assert len({id(t) for t in weights}) == 2 * 6


# ---- in a bundle


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no mask", "[B,1,N,M]"])
def test_the_bundles_model_is_the_untouched_one_and_shared_weights_are_in_it_once(name: str, tmp_path: Path) -> None:
    kind = matching(name)
    model = kind.make()
    with bca_deploy.export(model, tmp_path / "b", inputs=kind.pair(), axes=dict(kind.axes), dims=dict(kind.dims)) as bundle:
        assert [layer.spec.family for layer in bundle.manifest.layers] == ["lightglue"] * 2
        entry = bundle.manifest.models[0]
    graph = onnx.load(tmp_path / "b" / entry.file)
    assert [each.version for each in graph.opset_import if not each.domain] == [17]
    shapes = sorted(tuple(t.dims) for t in graph.graph.initializer if len(t.dims) == 2 and min(t.dims) > 1)
    assert shapes == sorted([(DIM, DIM)] * 6 + [(2 * DIM, 2 * DIM)] * 2 + [(2 * DIM, DIM)] * 2)
    assert len([node for node in graph.graph.node if node.op_type == "Softmax"]) == 4
    given = kind.sample(5, kind.sizes()["unequal"])
    with bca_deploy.open(tmp_path / "b") as session, torch.no_grad():
        for got, wanted in zip(session(**{key: t.numpy() for key, t in given.items()}), model(**given), strict=True):
            np.testing.assert_allclose(got, wanted.numpy(), atol=2e-5)


# ---- refused


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (OtherScale, r"\|logit\| 1: out differs by .* in live rows"),
        (Undefined, "in rows that have no live key"),
        (Mean, "in rows that have no live key"),
        (Rectified, r"no mask, \|logit\| 1: out differs by .* in live rows"),
        (Showing, "no mask, .* it returns"),
    ],
)
def test_a_block_that_computes_something_else_is_refused_with_the_case(block: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ParityError, match=rf"blocks\.0: .*{message}.*--keep-literal blocks\.0"):
        find(matching(block=block).make())


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (TalkingHeads, r"it has talking_heads\.weight, which LightGlue's CrossBlock has not"),
        (OwnQueries, r"it has to_q\.bias, which LightGlue's CrossBlock has not"),
        (Unnormalised, r"LightGlue's CrossBlock has ffn\.1\.bias, and this module has not \(did you mean 'ffn\.2\.bias'\?\)"),
        (Biased, "forward needs 'bias', which this layer has not"),
    ],
)
def test_what_the_family_has_not_is_refused_by_name(block: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"blocks\.0 looks like the layer and is not: .*{message}.*--keep-literal"):
        find(matching(block=block).make())


def test_attention_maps_that_show_are_refused_with_the_way_out() -> None:
    kind = matching(block=ShowingOnDemand)
    plain = plain_copy(kind.make())
    plain.ways["return_attn"] = True
    with pytest.raises(ExportError, match=r"blocks\.0: its attention maps show .*--keep-literal blocks\.0"):
        uses_of(plain, find(plain), kind.pair()[0])


def test_a_mask_that_differs_from_head_to_head_is_refused() -> None:
    kind = matching("[B,1,N,M]")
    model = kind.make()
    model.ways["pairs"] = lambda left, right: PAIRS["[B,1,N,M]"](left, right).expand(-1, HEADS, -1, -1)
    plain = plain_copy(model)
    with pytest.raises(InputError, match=rf"a mask \[\d, {HEADS}, \d, \d\] differs from head to head"):
        uses_of(plain, find(plain), kind.pair()[0])


@pytest.mark.slow
def test_a_mask_of_pairs_that_is_of_no_two_sides_is_another_function(tmp_path: Path) -> None:
    """A window, say: the model's outputs tell."""
    kind = matching("[B,1,N,M]")
    model = kind.make()
    model.ways["pairs"] = lambda left, right: torch.ones(left.shape[1], right.shape[1], dtype=torch.bool).tril()[None, None]
    with pytest.raises(ParityError):
        bca_deploy.export(model, tmp_path / "b", inputs=kind.pair(), axes=dict(kind.axes), dims=dict(kind.dims))


def test_the_block_alone_is_the_model() -> None:
    (found,) = find(seeded(CrossBlock))
    assert (found.path, found.checkpoint.spec.family) == ("", "lightglue")
