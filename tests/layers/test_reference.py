"""The reference layer: against the published package, against the seed written as plain loops, and by its symmetries."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import bidirectional_cross_attention as published
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.layers import make_spec
from support.rounding import rounding
from torch import Tensor, nn

from bca_deploy.errors import InputError
from bca_deploy.layers.reference import BidirectionalCrossAttention, BidirectionalCrossAttentionTransformer, RMSNorm, build
from bca_deploy.spec import NORM_EPS, LayerSpec

Array = NDArray[np.float64]

B, N, M, H = 3, 5, 7, 3
MASKS = ("none", "x", "context", "both")
BIASES = (None, (N, M), (H, N, M), (1, H, N, M), (B, H, N, M))

#: How far two float32 results may be apart: the largest |logit| here is 27.2, bias included.
WITHIN = 2 * rounding("fp32", 28)

# Few and always the same: a failure must be the change's, not the day's.
few = settings(max_examples=30, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only lose time to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a telling value: with fresh ones attention is nearly uniform and every norm is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.4 if "to_qk" in name else 0.3  # logits of a few units: neither uniform nor one-hot
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + (0.5 if parameter.ndim == 1 else 0.0))
    return module


def floats(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(spec: LayerSpec) -> Any:
    """The layer in float64 and eval mode: a symmetry must hold to the last digits, not to float32's."""
    return randomise(build(spec)).double().eval()


def doubles(given: dict[str, Any]) -> dict[str, Any]:
    return {name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in given.items()}


def inputs(spec: LayerSpec, masks: str = "none", bias: tuple[int, ...] | None = None, **more: Any) -> dict[str, Any]:
    """Inputs in which batch row 0 has no live ``x`` and row 1 no live ``context``, where there are such masks."""
    given = {"x": floats(B, N, spec.dim, seed=1), "context": floats(B, M, spec.context_dim, seed=2)}
    if masks in ("x", "both"):
        given["mask"] = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1, 0, 1, 1, 0]]).bool()
    if masks in ("context", "both"):
        given["context_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 1, 1]]).bool()
    if bias is not None:
        given["rel_pos_bias"] = 3 * floats(*bias, seed=3)
    return given | more


def assert_equal(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], told: object, within: float = WITHIN) -> None:
    """Hold every output to ``within`` of its largest value."""
    assert len(got) == len(wanted), told
    for index, (mine, true) in enumerate(zip(got, wanted, strict=True)):
        assert mine.shape == true.shape, (told, index)
        assert mine.dtype == true.dtype, (told, index)
        error = (mine.double() - true.double()).abs().max().item()
        assert error <= within * max(1.0, true.abs().max().item()), (told, index, error)


# The published package, same weights


def package_layer(spec: LayerSpec, dropout: float = 0.0) -> nn.Module:
    layer = published.BidirectionalCrossAttention(
        dim=spec.dim,
        context_dim=spec.context_dim,
        heads=spec.heads,
        dim_head=spec.dim_head,
        prenorm=spec.prenorm,
        talking_heads=spec.talking_heads,
        dropout=dropout,
    )
    return randomise(layer)


def package_transformer(spec: LayerSpec, factor: float, dropout: float = 0.0) -> nn.Module:
    transformer = published.BidirectionalCrossAttentionTransformer(
        dim=spec.dim,
        depth=spec.depth,
        context_dim=spec.context_dim,
        heads=spec.heads,
        dim_head=spec.dim_head,
        talking_heads=spec.talking_heads,
        ff_expansion_factor=factor,
        final_norms=spec.final_norms,
        dropout=dropout,
    )
    return randomise(transformer)


def transformer_spec(factor: float = 1.5, **changes: Any) -> LayerSpec:
    sizes = {"depth": 1, "context_dim": 16} | changes
    hidden = {"ff_hidden": int(24 * factor), "context_ff_hidden": int(sizes["context_dim"] * factor)}
    return make_spec(prenorm=True, norm="rms", **hidden, **sizes)


def twin(spec: LayerSpec, original: nn.Module, dropout: float = 0.0) -> nn.Module:
    """The module under test with the weights of ``original``; the names must be the same."""
    module = build(spec, dropout)
    module.load_state_dict(original.state_dict(), strict=True)
    return module


@pytest.mark.parametrize("talking_heads", [False, True], ids=["", "talking"])
@pytest.mark.parametrize("prenorm", [False, True], ids=["bare", "prenorm"])
@pytest.mark.parametrize("context_dim", [16, 24])
def test_layer_equals_the_published_package_over_every_option(context_dim: int, prenorm: bool, talking_heads: bool) -> None:
    spec = make_spec(context_dim=context_dim, prenorm=prenorm, norm="rms", talking_heads=talking_heads)
    original = package_layer(spec).eval()
    layer = twin(spec, original).eval()
    for masks, bias, return_attn in itertools.product(MASKS, BIASES, (False, True)):
        given = inputs(spec, masks, bias, return_attn=return_attn)
        assert_equal(layer(**given), original(**given), (masks, bias, return_attn))


def test_context_dim_defaults_to_dim_as_in_the_published_package() -> None:
    sizes = {"dim": 24, "heads": 3, "dim_head": 8}
    original = randomise(published.BidirectionalCrossAttention(**sizes))
    layer = BidirectionalCrossAttention(**sizes, norm="rms")
    layer.load_state_dict(original.state_dict())
    given = inputs(make_spec(context_dim=24))
    assert_equal(layer(**given), original(**given), "context_dim None")


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("context_dim", "final_norms"), [(16, False), (24, False), (24, True)])
@pytest.mark.parametrize("factor", [1.3, 4.0])
def test_transformer_equals_the_published_package_over_every_option(
    depth: int, context_dim: int, final_norms: bool, factor: float
) -> None:
    for talking_heads in (False, True):
        spec = transformer_spec(
            factor, depth=depth, context_dim=context_dim, final_norms=final_norms, talking_heads=talking_heads
        )
        original = package_transformer(spec, factor).eval()
        transformer = twin(spec, original).eval()
        for masks, bias in itertools.product(MASKS, BIASES):
            given = inputs(spec, masks, bias)
            assert_equal(transformer(**given), original(**given), (talking_heads, masks, bias))


@few
@given(batch=st.integers(1, 3), x_len=st.integers(1, 9), context_len=st.integers(1, 9), seed=st.integers(0, 99))
def test_layer_equals_the_published_package_at_every_length(batch: int, x_len: int, context_len: int, seed: int) -> None:
    spec = make_spec(prenorm=True, norm="rms", talking_heads=True)
    original = package_layer(spec).eval()
    given = {
        "x": floats(batch, x_len, spec.dim, seed=seed),
        "context": floats(batch, context_len, spec.context_dim, seed=seed + 1),
        "mask": floats(batch, x_len, seed=seed + 2) > 0,
        "context_mask": floats(batch, context_len, seed=seed + 3) > 0,
        "return_attn": True,
    }
    assert_equal(twin(spec, original).eval()(**given), original(**given), given["x"].shape)


@pytest.mark.parametrize("depth", [None, 2])
def test_training_draws_the_same_dropout_as_the_published_package(depth: int | None) -> None:
    # Equal under one seed only if both maps are dropped, in this order, before the talking heads.
    spec = make_spec(talking_heads=True) if depth is None else transformer_spec(depth=depth, talking_heads=True)
    original = package_layer(spec, 0.4) if depth is None else package_transformer(spec, 1.5, 0.4)
    modules = (twin(spec, original, 0.4).train(), original.train())
    results = []
    for module in modules:
        torch.manual_seed(5)
        results.append(module(**inputs(spec, "both")))
    assert_equal(*results, told=depth)


@pytest.mark.parametrize("depth", [None, 2])
def test_float64_equals_the_published_package_with_its_eps_pinned(depth: int | None) -> None:
    spec = make_spec(prenorm=True, norm="rms") if depth is None else transformer_spec(depth=depth)
    original = (package_layer(spec) if depth is None else package_transformer(spec, 1.5)).double().eval()
    for norm in (m for m in original.modules() if isinstance(m, nn.RMSNorm)):
        norm.eps = NORM_EPS["rms"]
    given = doubles(inputs(spec, "both", (N, M)))
    assert_equal(twin(spec, original).double().eval()(**given), original(**given), depth, within=1e-13)


# The seed, written as loops


def loop_norm(rows: Array, weight: Array, bias: Array) -> Array:
    result = np.empty_like(rows)
    for index in np.ndindex(rows.shape[:-1]):
        row = [float(value) for value in rows[index]]
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        result[index] = [(v - mean) / math.sqrt(variance + 1e-5) * w + b for v, w, b in zip(row, weight, bias, strict=True)]
    return result


def loop_linear(rows: Array, weight: Array, bias: Array | None = None) -> Array:
    result = np.zeros((*rows.shape[:-1], weight.shape[0]))
    for index in np.ndindex(result.shape):
        terms = [float(a) * float(b) for a, b in zip(rows[index[:-1]], weight[index[-1]], strict=True)]
        result[index] = sum(terms) + (0.0 if bias is None else float(bias[index[-1]]))
    return result


def loop_softmax(values: list[float]) -> list[float]:
    largest = max(values)
    powers = [math.exp(value - largest) for value in values]
    return [power / sum(powers) for power in powers]


def loop_logits(qk: Array, context_qk: Array, spec: LayerSpec, extras: dict[str, Array]) -> Array:
    """Similarity, bias and fill, one number at a time."""
    batch, rows, columns, d = qk.shape[0], qk.shape[1], context_qk.shape[1], spec.dim_head
    sim = np.empty((batch, spec.heads, rows, columns))
    for b, h, i, j in np.ndindex(sim.shape):
        product = sum(float(qk[b, i, h * d + k]) * float(context_qk[b, j, h * d + k]) for k in range(d))
        bias = extras.get("rel_pos_bias")
        added = 0.0 if bias is None else float(np.broadcast_to(bias, sim.shape)[b, h, i, j])
        live = ("mask" not in extras or extras["mask"][b, i]) and ("context_mask" not in extras or extras["context_mask"][b, j])
        sim[b, h, i, j] = product * d**-0.5 + added if live else -np.finfo(np.float64).max
    return sim


def loop_mix(maps: Array, weight: Array | None) -> Array:
    if weight is None:
        return maps
    mixed = np.zeros_like(maps)
    for b, h, i, j in np.ndindex(maps.shape):
        mixed[b, h, i, j] = sum(float(weight[h, g, 0, 0]) * float(maps[b, g, i, j]) for g in range(maps.shape[1]))
    return mixed


def loop_gather(maps: Array, values: Array, d: int) -> Array:
    """Rows of ``maps [B, H, N, M]`` gather ``values [B, M, H*d]``."""
    batch, heads, rows, columns = maps.shape
    result = np.zeros((batch, rows, heads * d))
    for b, h, i, k in np.ndindex(batch, heads, rows, d):
        result[b, i, h * d + k] = sum(float(maps[b, h, i, j]) * float(values[b, j, h * d + k]) for j in range(columns))
    return result


def seed_in_loops(weights: dict[str, Array], spec: LayerSpec, x: Array, context: Array, **extras: Array) -> tuple[Array, ...]:
    """The seed's semantics in float64, sharing no operation with the layer under test."""
    if spec.prenorm:
        x = loop_norm(x, weights["norm.weight"], weights["norm.bias"])
        context = loop_norm(context, weights["context_norm.weight"], weights["context_norm.bias"])
    qk, v = (loop_linear(x, weights[f"to_{name}.weight"]) for name in ("qk", "v"))
    context_qk, context_v = (loop_linear(context, weights[f"context_to_{name}.weight"]) for name in ("qk", "v"))
    sim = loop_logits(qk, context_qk, spec, extras)
    attn, context_attn = np.empty_like(sim), np.empty_like(sim)
    for b, h, i in np.ndindex(sim.shape[:3]):
        attn[b, h, i] = loop_softmax(list(sim[b, h, i]))
    for b, h, j in np.ndindex(*sim.shape[:2], sim.shape[3]):
        context_attn[b, h, :, j] = loop_softmax(list(sim[b, h, :, j]))
    attn = loop_mix(attn, weights.get("talking_heads.weight"))
    context_attn = loop_mix(context_attn, weights.get("context_talking_heads.weight"))
    out = loop_gather(attn, context_v, spec.dim_head)
    context_out = loop_gather(context_attn.swapaxes(-1, -2), v, spec.dim_head)
    return (
        loop_linear(out, weights["to_out.weight"], weights["to_out.bias"]),
        loop_linear(context_out, weights["context_to_out.weight"], weights["context_to_out.bias"]),
        attn,
        context_attn,
    )


@few
@given(
    sizes=st.tuples(*[st.integers(1, high) for high in (2, 4, 4, 2, 3)]),
    prenorm=st.booleans(),
    talking_heads=st.booleans(),
    masks=st.sampled_from(MASKS),
    bias=st.sampled_from([0, 2, 3, 4]),
    seed=st.integers(0, 99),
)
def test_layer_equals_the_seed_written_as_loops(
    sizes: tuple[int, ...], prenorm: bool, talking_heads: bool, masks: str, bias: int, seed: int
) -> None:
    batch, x_len, context_len, heads, dim_head = sizes
    spec = LayerSpec(dim=3, context_dim=2, heads=heads, dim_head=dim_head, prenorm=prenorm, talking_heads=talking_heads)
    layer = randomise(build(spec), seed).double().eval()
    given = {
        "x": floats(batch, x_len, 3, seed=seed, dtype=torch.float64),
        "context": floats(batch, context_len, 2, seed=seed + 1, dtype=torch.float64),
    }
    # A third of the positions live: dead rows and wholly dead batch rows come up often.
    if masks in ("x", "both"):
        given["mask"] = floats(batch, x_len, seed=seed + 2) > 0.4
    if masks in ("context", "both"):
        given["context_mask"] = floats(batch, context_len, seed=seed + 3) > 0.4
    if bias:
        shape = (batch, heads, x_len, context_len)[4 - bias :]
        given["rel_pos_bias"] = 2 * floats(*shape, seed=seed + 4, dtype=torch.float64)
    weights = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    wanted = seed_in_loops(weights, spec, **{name: tensor.numpy() for name, tensor in given.items()})
    with torch.no_grad():
        got = layer(**given, return_attn=True)
    assert_equal(got, tuple(map(torch.from_numpy, wanted)), given, within=1e-12)


# Symmetries


def swap_sides(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename each side's weights to the other's."""
    return {n.removeprefix("context_") if n.startswith("context_") else f"context_{n}": t for n, t in state.items()}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", [{}, {"prenorm": True}, {"prenorm": True, "norm": "rms"}, {"talking_heads": True}], ids=str)
def test_swapping_x_and_context_swaps_the_outputs(options: dict[str, Any], masks: str) -> None:
    spec = make_spec(**options)
    layer = exact(spec)
    other = build(replace(spec, dim=spec.context_dim, context_dim=spec.dim)).double().eval()
    other.load_state_dict(swap_sides(layer.state_dict()))
    given = doubles(inputs(spec, masks, (B, H, N, M)))
    turned = {
        "x": given["context"],
        "context": given["x"],
        "mask": given.get("context_mask"),
        "context_mask": given.get("mask"),
        "rel_pos_bias": given["rel_pos_bias"].transpose(-1, -2),
    }
    out, context_out, attn, context_attn = layer(**given, return_attn=True)
    swapped = other(**turned, return_attn=True)
    wanted = (context_out, out, context_attn.transpose(-1, -2), attn.transpose(-1, -2))
    assert_equal(swapped, wanted, masks, within=1e-12)


@pytest.mark.parametrize("depth", [None, 2])
def test_padding_with_a_mask_equals_truncation_on_live_rows(depth: int | None) -> None:
    spec = make_spec(prenorm=True) if depth is None else transformer_spec(depth=depth)
    module = exact(spec)
    shapes = ((1, N, spec.dim), (1, M, spec.context_dim), (H, N, M))
    x, context, bias = (floats(*shape, seed=k, dtype=torch.float64) for k, shape in enumerate(shapes))
    rows, columns = 3, 4
    cut = module(x[:, :rows], context[:, :columns], rel_pos_bias=bias[:, :rows, :columns])
    # What stands in the padding must not matter, however large.
    x[:, rows:], context[:, columns:] = 50.0, -50.0
    mask, context_mask = torch.arange(N)[None] < rows, torch.arange(M)[None] < columns
    padded = module(x, context, mask, context_mask, rel_pos_bias=bias)
    assert_equal((padded[0][:, :rows], padded[1][:, :columns]), cut, depth, within=1e-12)


@pytest.mark.parametrize("depth", [None, 2])
def test_batch_rows_do_not_see_each_other(depth: int | None) -> None:
    spec = make_spec(prenorm=True) if depth is None else transformer_spec(depth=depth)
    module = exact(spec)
    given = doubles(inputs(spec, "both", (B, H, N, M)))
    alone = [module(**{name: tensor[b : b + 1] for name, tensor in given.items()}) for b in range(B)]
    assert_equal(module(**given), tuple(torch.cat(parts) for parts in zip(*alone, strict=True)), depth, within=1e-12)


@few
@given(order=st.permutations(range(M)))
def test_the_order_of_context_does_not_matter_to_x(order: list[int]) -> None:
    spec = make_spec(prenorm=True)
    layer = exact(spec)
    given = doubles(inputs(spec, "both", (N, M)))
    moved = given | {name: given[name][:, order] for name in ("context", "context_mask", "rel_pos_bias")}
    out, context_out = layer(**given)
    assert_equal(layer(**moved), (out, context_out[:, order]), order, within=1e-12)


def test_one_mask_alone_equals_both_with_the_other_all_true() -> None:
    spec = make_spec()
    layer = exact(spec)
    given = doubles(inputs(spec, "both"))
    mask, context_mask = given.pop("mask"), given.pop("context_mask")
    ones, context_ones = torch.ones_like(mask), torch.ones_like(context_mask)
    assert_equal(layer(**given, mask=mask), layer(**given, mask=mask, context_mask=context_ones), "x", within=1e-12)
    assert_equal(
        layer(**given, context_mask=context_mask), layer(**given, mask=ones, context_mask=context_mask), "context", within=1e-12
    )
    assert_equal(layer(**given, mask=ones), layer(**given), "all true is no mask", within=1e-12)


@pytest.mark.parametrize("shape", [(N, M), (H, N, M), (1, H, N, M)])
def test_a_smaller_bias_equals_its_broadcast(shape: tuple[int, ...]) -> None:
    spec = make_spec()
    layer = exact(spec)
    given = doubles(inputs(spec, "both", shape))
    wide = given | {"rel_pos_bias": given["rel_pos_bias"].expand(B, H, N, M)}
    assert_equal(layer(**given), layer(**wide), shape, within=1e-12)


@pytest.mark.parametrize("shift", [-1e5, 1e5])
@pytest.mark.parametrize("masks", MASKS)
def test_a_constant_added_to_every_logit_changes_nothing(masks: str, shift: float) -> None:
    # A fill of -10000 instead of the lowest number would let dead keys win at very negative logits.
    layer = exact(make_spec())
    given = doubles(inputs(make_spec(), masks, (N, M), return_attn=True))
    shifted = given | {"rel_pos_bias": given["rel_pos_bias"] + shift}
    assert_equal(layer(**shifted), layer(**given), masks, within=1e-9)


# Dead rows, maps, dropout


def test_dead_rows_get_the_mean_of_the_values() -> None:
    spec = make_spec(prenorm=True)
    layer = exact(spec)
    given = doubles(inputs(spec, "both", (B, H, N, M)))
    out, context_out = layer(**given)
    # The mean over ALL values, the masked ones too.
    context_mean = layer.to_out(layer.context_to_v(layer.context_norm(given["context"])).mean(1, keepdim=True))
    x_mean = layer.context_to_out(layer.to_v(layer.norm(given["x"])).mean(1, keepdim=True))
    live = given["mask"] & given["context_mask"].any(1, keepdim=True)
    context_live = given["context_mask"] & given["mask"].any(1, keepdim=True)
    for got, wanted, alive in ((out, context_mean, live), (context_out, x_mean, context_live)):
        away = (got - wanted).abs().amax(-1)
        assert away[~alive].max() < 1e-12
        assert away[alive].min() > 1e-2


def test_without_masks_no_row_is_dead() -> None:
    spec = make_spec()
    layer = randomise(build(spec)).eval()
    _, _, attn, context_attn = layer(**inputs(spec, return_attn=True))
    assert (attn - 1 / M).abs().amax(-1).min() > 1e-2
    assert (context_attn - 1 / N).abs().amax(-2).min() > 1e-2


@pytest.mark.parametrize("masks", MASKS)
def test_attention_maps_have_the_shape_of_the_similarity_and_sum_to_one(masks: str) -> None:
    spec = make_spec()
    layer = randomise(build(spec)).eval()
    *outputs, attn, context_attn = layer(**inputs(spec, masks, (H, N, M), return_attn=True))
    assert [tuple(t.shape) for t in (*outputs, attn, context_attn)] == [(B, N, 24), (B, M, 16), (B, H, N, M), (B, H, N, M)]
    torch.testing.assert_close(attn.sum(-1), torch.ones(B, H, N))
    torch.testing.assert_close(context_attn.sum(-2), torch.ones(B, H, M))


def test_maps_are_zero_at_dead_keys_of_live_rows_and_uniform_on_dead_rows() -> None:
    spec = make_spec()
    given = inputs(spec, "both")
    _, _, attn, context_attn = randomise(build(spec)).eval()(**given, return_attn=True)
    mask, context_mask = given["mask"][2], given["context_mask"][2]
    assert attn[2][:, mask][..., ~context_mask].abs().max() == 0
    assert context_attn[2][:, ~mask][..., context_mask].abs().max() == 0
    torch.testing.assert_close(attn[2][:, ~mask], torch.full((H, 2, M), 1 / M))
    torch.testing.assert_close(attn[:2], torch.full((2, H, N, M), 1 / M))  # rows 0 and 1 have no live pair
    torch.testing.assert_close(context_attn[:2], torch.full((2, H, N, M), 1 / N))


def test_asking_for_maps_does_not_change_the_outputs() -> None:
    spec = make_spec(talking_heads=True)
    layer = randomise(build(spec)).eval()
    given = inputs(spec, "both")
    assert_equal(layer(**given, return_attn=True)[:2], layer(**given), "maps")


@pytest.mark.parametrize("depth", [None, 1])
def test_dropout_is_active_in_training_and_inert_in_eval(depth: int | None) -> None:
    spec = make_spec() if depth is None else transformer_spec()
    module = randomise(build(spec, dropout=0.5)).train()
    plain = twin(spec, module)
    given = inputs(spec)
    first, second = module(**given), module(**given)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(first, second, strict=True))
    module.eval()
    assert_equal(module(**given), plain.train()(**given), "eval")


def test_dropout_keeps_the_mean_of_both_maps() -> None:
    spec = make_spec()
    layer = randomise(build(spec, dropout=0.25))
    given = {"x": floats(1, 2, 24), "context": floats(1, 3, 16), "return_attn": True}
    wanted = layer.eval()(**given)[2:]
    layer.train()
    torch.manual_seed(0)
    with torch.no_grad():
        draws = [layer(**given)[2:] for _ in range(1500)]
    means = tuple(torch.stack(maps).mean(0) for maps in zip(*draws, strict=True))
    # One draw deviates by at most sqrt(p / (1 - p)) = 0.58; 5 of its standard errors over 1500 draws.
    assert_equal(means, wanted, "mean", within=0.075)
    assert all((torch.stack(maps) == 0).float().mean().sub(0.25).abs() < 0.03 for maps in zip(*draws, strict=True))


# Normalisation


def test_rms_norm_in_float64_uses_the_eps_of_float32() -> None:
    x = torch.full((1, 4), 1e-4, dtype=torch.float64)
    got = RMSNorm(4).double()(x)
    torch.testing.assert_close(got, x / math.sqrt(1e-8 + 1.1920929e-07), rtol=1e-12, atol=0)
    unpinned = nn.RMSNorm(4).double()(x)
    assert (got - unpinned).abs().max() > 0.5, "the eps must be visible at this size, or the test proves nothing"


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_eps_given_is_the_eps_used(kind: Any) -> None:
    spec = make_spec(prenorm=True, norm=kind)
    assert spec.norm_eps == {"layer": 1e-5, "rms": 1.1920929e-07}[kind]
    x, context = 1e-3 * floats(1, N, 24), 1e-3 * floats(1, M, 16, seed=1)
    results = [randomise(build(replace(spec, norm_eps=eps))).eval()(x, context)[0] for eps in (spec.norm_eps, 1e-3)]
    default = BidirectionalCrossAttention(dim=24, context_dim=16, heads=3, dim_head=8, prenorm=True, norm=kind)
    assert_equal(randomise(default).eval()(x, context)[:1], (results[0],), "default eps")
    assert (results[0] - results[1]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rms_norm_does_not_overflow(dtype: torch.dtype) -> None:
    x = 1e4 * floats(2, 64).clamp(-6, 6)
    wide = RMSNorm(64)(x.to(dtype).float())
    got = RMSNorm(64).to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.float(), wide, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prenorm_layer_in_half_precision_is_finite_at_loud_activations_and_dead_rows(dtype: torch.dtype) -> None:
    for norm in ("layer", "rms"):
        spec = make_spec(prenorm=True, norm=norm)
        layer = build(spec).to(dtype).eval()
        given = inputs(spec, "both")
        given |= {name: (1e4 * given[name]).to(dtype) for name in ("x", "context")}
        for result in layer(**given, return_attn=True):
            assert result.dtype == dtype
            assert torch.isfinite(result).all(), norm


# Names and refusals

SEED_NAMES = {
    "to_qk.weight", "context_to_qk.weight", "to_v.weight", "context_to_v.weight",
    "to_out.weight", "to_out.bias", "context_to_out.weight", "context_to_out.bias",
}  # fmt: skip
SEED_NORMS = {"norm.weight", "norm.bias", "context_norm.weight", "context_norm.bias"}
SEED_TALKING = {"talking_heads.weight", "context_talking_heads.weight"}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, SEED_NAMES),
        ({"prenorm": True}, SEED_NAMES | SEED_NORMS),
        ({"talking_heads": True}, SEED_NAMES | SEED_TALKING),
        ({"prenorm": True, "talking_heads": True}, SEED_NAMES | SEED_NORMS | SEED_TALKING),
        ({"prenorm": True, "norm": "rms"}, SEED_NAMES | {"norm.weight", "context_norm.weight"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_parameter_names_are_the_seeds(options: dict[str, Any], names: set[str]) -> None:
    assert set(build(make_spec(**options)).state_dict()) == names


def test_transformer_parameter_names_are_the_published_ones() -> None:
    for context_dim, final_norms in ((16, False), (24, True)):
        spec = transformer_spec(depth=2, context_dim=context_dim, final_norms=final_norms, talking_heads=True)
        shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (build(spec), package_transformer(spec, 1.5))]
        assert shapes[0] == shapes[1]


def test_build_gives_the_module_that_the_spec_describes() -> None:
    assert isinstance(build(make_spec()), BidirectionalCrossAttention)
    transformer = build(transformer_spec(depth=3))
    assert isinstance(transformer, BidirectionalCrossAttentionTransformer)
    assert len(transformer.layers) == 3


def test_transformer_refuses_return_attn_with_the_reason() -> None:
    spec = transformer_spec()
    with pytest.raises(InputError, match=r"return_attn: the published transformer ignores it .* use one of its layers instead"):
        build(spec)(**inputs(spec), return_attn=True)


@pytest.mark.parametrize("absent", ["depth", "ff_hidden", "context_ff_hidden"])
def test_transformer_refuses_a_spec_that_is_not_a_transformers(absent: str) -> None:
    changes = {"depth": 1, "ff_hidden": 8, "context_ff_hidden": 8} | {absent: None}
    with pytest.raises(InputError, match=r"layer\.depth"):
        BidirectionalCrossAttentionTransformer(replace(make_spec(prenorm=True, norm="rms"), **changes))


def test_bare_spec_is_no_transformer() -> None:
    with pytest.raises(InputError, match=r"a transformer needs layer\.depth"):
        BidirectionalCrossAttentionTransformer(make_spec())


def test_spec_refuses_final_norms_where_the_published_transformer_cannot_run() -> None:
    with pytest.raises(
        InputError, match=r"final_norms with context_dim 16 and dim 24: .* both final norms for dim .* final_norms = false"
    ):
        transformer_spec(final_norms=True)
    # The reason is true: the package builds it and fails when it is run.
    wide = published.BidirectionalCrossAttentionTransformer(dim=24, context_dim=16, depth=1, final_norms=True, heads=3)
    with pytest.raises(RuntimeError):
        wide(floats(1, N, 24), floats(1, M, 16))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dim": 0}, r"layer\.dim is 0; it must be at least 1"),
        ({"heads": -1}, r"layer\.heads is -1; it must be at least 1"),
        ({"depth": 0}, r"layer\.depth is 0; it must be at least 1"),
        ({"final_norms": True}, r"layer\.final_norms and layer\.ff_hidden belong to the transformer; set layer\.depth"),
        ({"ff_hidden": 8}, r"belong to the transformer; set layer\.depth"),
        ({"depth": 1, "prenorm": True, "norm": "rms"}, r"layer\.depth is set, so layer\.ff_hidden"),
        ({"depth": 1, "ff_hidden": 8, "context_ff_hidden": 8, "prenorm": True}, r"always has RMSNorm .* layer\.norm = 'rms'"),
        ({"depth": 1, "ff_hidden": 8, "context_ff_hidden": 8, "norm": "rms"}, r"always has RMSNorm .* set layer\.prenorm"),
    ],
    ids=str,
)
def test_spec_refuses_what_cannot_be_built(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        make_spec(**changes)
