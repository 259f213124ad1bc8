"""What inputs mean is found out by running the model: said only where the model really behaves so."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from support.models import KINDS, Contrastive, masked_mean
from torch import Tensor, nn

from bca_deploy.signature import Axis, DimRange, Dims, Signature
from bca_deploy.signature import Tensor as Named
from bca_deploy.whole.draws import draws_of
from bca_deploy.whole.samples import Sample, named_outputs
from bca_deploy.whole_parity.evaluate import Evaluator
from bca_deploy.whole_parity.traits import Laboratory

Axes = Mapping[str, tuple[Axis, ...]]

X: Axes = {"x": ("batch", "n", 6)}
MASKED: Axes = {**X, "mask": ("batch", "n")}
BOTH: Axes = {**MASKED, "y": ("batch", "m", 6), "y_mask": ("batch", "m")}


class Body(nn.Module):
    """A model whose forward is one function, with a mask that may be left out or not."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body


class OfX(Body):
    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class OfMasked(Body):
    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.body(x, mask)


class OfMaskedOrNot(Body):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return self.body(x, mask)


class OfBoth(Body):
    def forward(self, x: Tensor, mask: Tensor, y: Tensor, y_mask: Tensor | None = None) -> Any:
        return self.body(x, mask, y, y_mask)


DTYPES = {torch.float32: "float32", torch.int64: "int64", torch.bool: "bool"}


def found(
    model: nn.Module, axes: Axes, *outputs: tuple[Axis, ...], masks: Mapping[str, str] | None = None, **ranges: DimRange
) -> Signature:
    """What the laboratory makes of a model with these axes; tensors with "mask" in their names are masks."""
    dims = Dims(
        {name: ranges.get(name, DimRange(1, 3, 12)) for each in axes.values() for name in each if isinstance(name, str)}
    )
    sizes = dict(zip(dims, (3, 7, 5, 4), strict=False))
    sample: Sample = {}
    for name, each in axes.items():
        shape = [sizes.get(str(axis), axis) for axis in each]
        sample[name] = torch.ones(shape, dtype=torch.int64 if name in (masks or {}) else torch.bool)
        if "mask" not in name:
            sample[name] = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    inputs = tuple(Named(name, DTYPES[sample[name].dtype], each) for name, each in axes.items())  # type: ignore[arg-type]
    names = named_outputs(model(**sample))
    made = tuple(Named(name, DTYPES[t.dtype], each) for (name, t), each in zip(names.items(), outputs, strict=True))  # type: ignore[arg-type]
    draws = draws_of([sample], inputs, masks or {}, {})
    return Laboratory(model, Evaluator(model.eval(), (), torch.float64), draws).refine(Signature(inputs, made, dims))


# ---- the batch


@pytest.mark.parametrize(
    ("body", "output"),
    [
        pytest.param(lambda x: x * 2, ("batch", "n", 6), id="each number"),
        pytest.param(lambda x: x.softmax(1).sum(1), ("batch", 6), id="along another axis"),
        pytest.param(lambda x: nn.functional.layer_norm(x, (6,)), ("batch", "n", 6), id="a norm of each row"),
        pytest.param(lambda x: x[..., 0] > 0, ("batch", "n"), id="truths"),
        pytest.param(lambda x: x.argmax(1), ("batch", 6), id="numbers of places"),
    ],
)
def test_a_batch_is_one_where_entries_are_apart(body: Callable[..., Any], output: tuple[Axis, ...]) -> None:
    assert found(OfX(body), X, output).batch == "batch"


@pytest.mark.parametrize(
    ("body", "output"),
    [
        pytest.param(lambda x: x - x.mean(0), ("batch", "n", 6), id="less their mean"),
        pytest.param(lambda x: x - 1e-4 * x.mean(0), ("batch", "n", 6), id="a little"),
        pytest.param(lambda x: x.cumsum(0), ("batch", "n", 6), id="each with those before"),
        pytest.param(lambda x: x.flip(0), ("batch", "n", 6), id="turned round"),
        pytest.param(lambda x: x / x.abs().amax(), ("batch", "n", 6), id="over the largest of all"),
        pytest.param(lambda x: x * x.shape[0], ("batch", "n", 6), id="times how many"),
        pytest.param(lambda x: x.sum(0), ("n", 6), id="their sum"),
        pytest.param(lambda x: x.mean(1) @ x.mean(1).T, ("batch", "batch"), id="each with each"),
        pytest.param(lambda x: x.transpose(0, 1), ("n", "batch", 6), id="not in front"),
        pytest.param(lambda x: x.reshape(-1, 6), ("batch * n", 6), id="laid in a row"),
    ],
)
def test_a_first_axis_whose_entries_know_of_each_other_is_no_batch(body: Callable[..., Any], output: tuple[Axis, ...]) -> None:
    assert found(OfX(body), X, output).batch is None


def test_entries_that_share_the_longest_length_are_not_apart() -> None:
    body = lambda x, mask: x * mask[..., None] / mask.sum(1).max()  # noqa: E731
    assert found(OfMasked(body), MASKED, ("batch", "n", 6)).batch is None


def test_an_output_without_the_batch_may_stand_beside_others_if_it_is_the_same_for_all() -> None:
    weights = torch.arange(6.0)
    assert found(OfX(lambda x: (x * 2, weights * 2)), X, ("batch", "n", 6), (6,)).batch == "batch"
    assert found(OfX(lambda x: (x * 2, x.sum((0, 1)))), X, ("batch", "n", 6), (6,)).batch is None


def test_a_batch_that_must_have_two_entries_or_can_have_only_one_is_none() -> None:
    assert found(OfX(lambda x: x * 2), X, ("batch", "n", 6), batch=DimRange(2, 3, 8)).batch is None
    assert found(OfX(lambda x: x * 2), X, ("batch", "n", 6), batch=DimRange(1, 1, 1)).batch is None


def test_the_batch_may_have_another_name() -> None:
    assert found(OfX(lambda x: x * 2), {"x": ("clips", "n", 6)}, ("clips", "n", 6)).batch == "clips"


def test_contrastive_models_have_no_batch() -> None:
    kind = KINDS["contrastive"]
    model = kind.make()
    assert isinstance(model, Contrastive)
    dims = Dims({name: DimRange(*each) for name, each in kind.dims.items()})
    inputs = (Named("regions", "float32", ("batch", "regions", 20)), Named("words", "int64", ("batch", "word_len")))
    outputs = (
        Named("logits", "float32", ("batch", "batch")),
        Named("scale", "float32", ()),
        Named("images", "float32", ("batch", 32)),
        Named("texts", "float32", ("batch", 32)),
    )
    draws = draws_of(kind.pair(), inputs, {}, {})
    made = Laboratory(model, Evaluator(model, (), torch.float64), draws).refine(Signature(inputs, outputs, dims))
    assert (made.batch, dict(made.masks)) == (None, {})


# ---- masks


def attended(x: Tensor, mask: Tensor) -> Tensor:
    """Each row with all live ones."""
    weights = (x @ x.transpose(1, 2)).masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return weights.nan_to_num() @ x


@pytest.mark.parametrize(
    ("body", "output"),
    [
        pytest.param(masked_mean, ("batch", 6), id="a mean of what is live"),
        pytest.param(attended, ("batch", "n", 6), id="attention"),
        pytest.param(lambda x, mask: x * mask[..., None], ("batch", "n", 6), id="zeros at padding"),
        pytest.param(lambda x, mask: x + 1, ("batch", "n", 6), id="each row by itself"),
        pytest.param(lambda x, mask: mask.sum(1), ("batch",), id="lengths"),
        pytest.param(lambda x, mask: (x + 1).cumsum(1), ("batch", "n", 6), id="each row with those before"),
    ],
)
def test_a_mask_that_hides_padding_is_one(body: Callable[..., Any], output: tuple[Axis, ...]) -> None:
    assert dict(found(OfMasked(body), MASKED, output).masks) == {"n": "mask"}


@pytest.mark.parametrize(
    ("body", "output"),
    [
        pytest.param(lambda x, mask: (x + mask[..., None]).mean(1), ("batch", 6), id="a mean of all"),
        pytest.param(lambda x, mask: masked_mean(x, mask) + x.shape[1], ("batch", 6), id="the length"),
        pytest.param(lambda x, mask: masked_mean(x, mask) + 1e-5 * x.mean(1), ("batch", 6), id="a little"),
        pytest.param(lambda x, mask: (x + 1).sum(1) + 0 * mask.sum(1, keepdim=True), ("batch", 6), id="a sum of all"),
        pytest.param(lambda x, mask: (x * mask[..., None]).flip(1), ("batch", "n", 6), id="from the end"),
        pytest.param(lambda x, mask: (x + 1).roll(1, 1) * mask[..., None], ("batch", "n", 6), id="the last beside the first"),
        pytest.param(
            lambda x, mask: nn.functional.conv1d((x + 1).mT, torch.ones(6, 6, 3), padding=1).mT * mask[..., None],
            ("batch", "n", 6),
            id="neighbours",
        ),
    ],
)
def test_a_mask_behind_which_padding_shows_is_none(body: Callable[..., Any], output: tuple[Axis, ...]) -> None:
    made = found(OfMasked(lambda x, mask: body(x.float(), mask)), MASKED, output)
    assert dict(made.masks) == {}


def test_an_integer_mask_that_is_declared_hides_padding_too() -> None:
    made = found(OfMasked(masked_mean), MASKED, ("batch", 6), masks={"mask": "n"})
    assert dict(made.masks) == {"n": "mask"}


def test_of_two_lengths_each_has_its_own_mask_only_where_it_hides() -> None:
    def body(x: Tensor, mask: Tensor, y: Tensor, y_mask: Tensor | None) -> Any:
        return masked_mean(x, mask), y.sum(1) + y.shape[1] + (0 if y_mask is None else y_mask.sum(1, keepdim=True))

    assert dict(found(OfBoth(body), BOTH, ("batch", 6), ("batch", 6)).masks) == {"n": "mask"}


def test_a_mask_hides_nothing_where_the_length_cannot_grow() -> None:
    made = found(OfMasked(masked_mean), MASKED, ("batch", 6), n=DimRange(1, 5, 7))
    assert dict(made.masks) == {}


def test_a_model_that_refuses_longer_inputs_has_no_mask_there() -> None:
    table = nn.Embedding(8, 6)
    body = lambda x, mask: masked_mean(x + table(torch.arange(x.shape[1])).detach(), mask)  # noqa: E731
    assert dict(found(OfMasked(body), MASKED, ("batch", 6)).masks) == {}


def test_a_mask_of_one_for_all_masks_no_batch() -> None:
    made = found(OfMasked(lambda x, mask: masked_mean(x, mask[None])), {**X, "mask": ("n",)}, ("batch", 6))
    assert (made.batch, dict(made.masks)) == ("batch", {})


# ---- what may be left out


def all_live(x: Tensor, mask: Tensor | None) -> Tensor:
    return masked_mean(x, torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask)


def test_a_mask_whose_absence_means_all_live_may_be_left_out() -> None:
    fills = {t.name: t.fill for t in found(OfMaskedOrNot(all_live), MASKED, ("batch", 6)).inputs}
    assert fills == {"x": None, "mask": True}


def test_an_integer_mask_is_filled_with_1() -> None:
    made = found(OfMaskedOrNot(all_live), MASKED, ("batch", 6), masks={"mask": "n"})
    assert [(t.fill, type(t.fill)) for t in made.inputs if t.name == "mask"] == [(1, int)]


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(OfMasked(all_live), id="it must be given"),
        pytest.param(
            OfMaskedOrNot(lambda x, mask: x.sum(1) if mask is None else masked_mean(x, mask)), id="its absence is else"
        ),
        pytest.param(
            OfMaskedOrNot(lambda x, mask: all_live(x, mask) * (1 if mask is None else 1 + 1e-6)), id="its absence is almost it"
        ),
        pytest.param(OfMaskedOrNot(masked_mean), id="without it the model fails"),
        pytest.param(
            OfMaskedOrNot(
                lambda x, mask: all_live(x, mask) if mask is None else {"output": all_live(x, mask), "more": x[:, 0]}
            ),
            id="without it there is less",
        ),
    ],
)
def test_a_mask_is_not_left_out_where_that_is_something_else(model: nn.Module) -> None:
    outputs = [("batch", 6)] * len(named_outputs(model(torch.ones(2, 3, 6), torch.ones(2, 3, dtype=torch.bool))))
    assert [t.fill for t in found(model, MASKED, *outputs).inputs] == [None, None]


def test_a_mask_that_alone_has_a_dimension_is_not_left_out() -> None:
    body = lambda x, mask: x if mask is None else x + 0 * mask.sum(1, keepdim=True)  # noqa: E731
    made = found(OfMaskedOrNot(body), {"x": ("batch", 6), "mask": ("batch", "n")}, ("batch", 6))
    assert [t.fill for t in made.inputs] == [None, None]


@pytest.mark.parametrize(
    ("name", "batch", "masks", "fills"),
    [
        ("stack", "batch", {"x_len": "mask", "context_len": "context_mask"}, {"mask", "context_mask"}),
        ("clip", "batch", {}, set()),
        ("encoders", "batch", {"word_len": "word_mask"}, set()),
        ("maps", "batch", {}, set()),
        ("policy", "batch", {}, {"mask"}),
        ("twice", "batch", {"x_len": "mask", "context_len": "context_mask"}, set()),
    ],
)
def test_of_the_kinds_of_models_each_has_what_it_has(name: str, batch: str, masks: dict[str, str], fills: set[str]) -> None:
    kind = KINDS[name]
    model = kind.make()
    dims = Dims({dim: DimRange(low, opt, high + 8) for dim, (low, opt, high) in kind.dims.items()})
    if name == "twice":  # its bias has a length
        dims = Dims({dim: DimRange(low, opt, 12) for dim, (low, opt, high) in kind.dims.items()})
    sample, other = kind.pair()
    kinds = {n: DTYPES[t.dtype] for n, t in sample.items()}
    inputs = tuple(
        Named(n, kinds[n], tuple(a or s for a, s in zip(axes, sample[n].shape, strict=True))) for n, axes in kind.axes.items()
    )  # type: ignore[arg-type]
    outputs = []
    sizes = kind.sizes()["odd"]
    for output, tensor in named_outputs(model(**sample)).items():
        second = named_outputs(model(**other))[output].shape
        dynamic = {(one, two): dim for dim, one, two in zip(sizes, sizes.values(), kind.sizes()["even"].values(), strict=False)}
        axes = tuple(dynamic.get((one, two), one) if one != two else one for one, two in zip(tensor.shape, second, strict=True))
        outputs.append(Named(output, DTYPES[tensor.dtype], axes))  # type: ignore[arg-type]
    draws = draws_of([sample, other], inputs, kind.masks, {})
    made = Laboratory(model, Evaluator(model, (), torch.float64), draws).refine(Signature(inputs, tuple(outputs), dims))
    assert (made.batch, dict(made.masks)) == (batch, masks)
    assert {t.name for t in made.inputs if t.fill} == fills
