"""The signature: what cannot be is refused, what can is read the same by all."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from support.clips import SIGNATURE
from support.layers import make_spec

from bca_deploy.errors import InputError
from bca_deploy.signature import Axis, DimRange, Dims, DType, Signature, Tensor, hull
from bca_deploy.spec import LAYER_DIMS, Bias, Interface, layer_signature

ranges = st.tuples(*[st.integers(1, 50)] * 3).map(lambda sizes: DimRange(*sorted(sizes)))


def layer(bias: Bias = "none", **changes: bool) -> Signature:
    return layer_signature(make_spec(), Interface(rel_pos_bias=bias, **changes))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"outputs": (Tensor("words", "float32", ("clips",)),)}, "words is the name of two tensors; give each its own"),
        ({"outputs": (Tensor("y", "float32", ("rows",)),)}, "dimension rows needs a range, and an input that has it"),
        ({"dims": Dims(SIGNATURE.dims, rows=DimRange(1, 1, 1))}, "dimension rows needs a range, and an input that has it"),
        ({"dims": Dims(clips=DimRange(1, 1, 1), time=DimRange(1, 1, 1))}, "dimension tokens needs a range"),
        ({"batch": "rows"}, "dimension rows needs a range"),
        ({"masks": {"time": "real"}}, r"real cannot mask time; a mask is a bool or integer input over \['clips', 'time'\]"),
        ({"masks": {"time": "frames"}}, "frames cannot mask time"),
        ({"masks": {"time": "words"}}, "words cannot mask time"),
        ({"outputs": (Tensor("y", "float32", ("clips", "time * rows")),)}, "dimension rows needs a range, and an input that"),
        ({"outputs": (Tensor("y", "float32", ("tokens // frames",)),)}, "dimension frames needs a range, and an input that"),
        ({"inputs": (*SIGNATURE.inputs, Tensor("more", "int32", ("time * 2",)))}, r"dimension time \* 2 needs a range, and"),
        ({"masks": {"clips": "shown"}}, "shown cannot mask clips"),
        ({"batch": None}, "shown cannot mask time"),
        ({"inputs": SIGNATURE.inputs[1:]}, "dimension time needs a range, and an input that has it and must be given"),
    ],
)
def test_a_signature_that_cannot_be_is_refused(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=f"^signature: {fault}"):
        replace(SIGNATURE, **changes)


@pytest.mark.parametrize("axis", ["time +", "time / 2", "time.real", "int(time)", "", "2.5"])
def test_an_axis_of_an_output_that_is_no_size_is_refused(axis: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(repr(axis))} is no size: give a number, a dimension, or an expression"):
        replace(SIGNATURE, outputs=(Tensor("y", "float32", ("clips", axis)),))


def with_output(*axes: Axis) -> Signature:
    """The clips with one output."""
    return replace(SIGNATURE, outputs=(Tensor("y", "float32", axes),))


def with_masks_of(dtype: DType) -> Signature:
    """The clips with masks of another element type."""
    changed = [replace(t, dtype=dtype, fill=1) if t.name in ("shown", "real") else t for t in SIGNATURE.inputs]
    return replace(SIGNATURE, inputs=tuple(changed))


FOLLOWS = with_output("clips", "(time - 1) // 2 + 1", 6)


@pytest.mark.parametrize(
    "signature",
    [SIGNATURE, layer(), layer("batch", attention_maps=True), FOLLOWS, with_masks_of("int32")],
    ids=["clips", "layer", "all", "expression", "integers"],
)
def test_it_comes_back_from_json_the_same(signature: Signature) -> None:
    adapter = TypeAdapter(Signature)
    again = adapter.validate_json(adapter.dump_json(signature))
    assert again == signature
    assert list(again.dims) == list(signature.dims)
    assert [type(tensor.fill) for tensor in again.inputs] == [type(tensor.fill) for tensor in signature.inputs]
    with pytest.raises(ValidationError, match="extra"):
        adapter.validate_python(adapter.dump_python(signature) | {"extra": 1})


@given(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)))
def test_sizes_are_read_from_the_arrays_that_they_shape(shape: tuple[int, ...]) -> None:
    for signature in (SIGNATURE, layer("plane")):
        sizes = signature.dims.named(shape)
        arrays = {t.name: np.empty(t.shape(sizes)) for t in signature.inputs}
        assert signature.sizes(arrays) == sizes
        assert signature.counts(arrays) == (signature.entries(sizes), signature.rows(sizes))
        assert list(sizes.values()) == list(shape)
        assert (signature.entries(sizes), signature.rows(sizes)) == (shape[0], shape[0] * (shape[1] + shape[2]))


def test_requests_share_a_batch_where_masks_tell_of_all_padding_and_no_tensor_has_two_lengths() -> None:
    assert SIGNATURE.pads
    assert layer().pads
    assert not layer(mask=False).pads
    assert layer(mask=False).not_stackable is None, "of one length they still can"
    assert replace(SIGNATURE, masks={}, outputs=()).not_stackable is None
    for signature, tensor in ((layer("shared"), "rel_pos_bias"), (layer(attention_maps=True), "attn")):
        assert signature.not_stackable is not None
        assert signature.not_stackable.name == tensor
    square = replace(SIGNATURE, outputs=(Tensor("similarity", "float32", ("clips", "clips")),))
    assert square.not_stackable == square.outputs[0], "an entry's row has the others' entries"


@pytest.mark.parametrize(("time", "wanted"), [(1, 1), (2, 1), (3, 2), (8, 4)])
def test_an_output_may_have_a_size_that_follows_from_others(time: int, wanted: int) -> None:
    assert FOLLOWS.outputs[0].shape({"clips": 2, "time": time, "tokens": 5}) == (2, wanted, 6)


def test_an_axis_that_is_a_dimension_is_that_whatever_its_name() -> None:
    size = Tensor("y", "float32", ("time * 2", "time * 3"))
    assert size.shape({"time": 4, "time * 3": 7}) == (8, 7)


def test_an_output_that_has_no_size_says_at_which_sizes() -> None:
    signature = with_output("clips", "time // (tokens - 3)")
    with pytest.raises(InputError, match=r"'time // \(tokens - 3\)' divides by 0 at time 6, tokens 3; give other sizes"):
        signature.outputs[0].shape({"clips": 2, "time": 6, "tokens": 3})


@pytest.mark.parametrize(
    ("axes", "stackable"),
    [
        (("clips", "(time - 1) // 2 + 1", 6), True),
        (("clips", "time * time"), True),
        (("clips", "2 * 3"), True),
        (("clips", "time * tokens"), False),
        (("clips", "time // 2", "tokens"), False),
        (("clips", "time // 2", "time"), False),
        (("clips", "clips * 2"), False),
        (("clips", "max(time, clips)"), False),
        (("clips * 2", "time"), False),
        (("time // 2", "clips"), False),
    ],
)
def test_requests_share_a_batch_where_what_follows_is_of_one_length(axes: tuple[Axis, ...], stackable: bool) -> None:
    signature = with_output(*axes)
    assert signature.not_stackable == (None if stackable else signature.outputs[0])
    assert signature.pads == stackable


@pytest.mark.parametrize("dtype", ["bool", "int32", "int64"])
def test_a_mask_is_of_bools_or_integers(dtype: DType) -> None:
    signature = with_masks_of(dtype)
    assert signature.masks_all
    assert signature.pads


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_mask_of_floating_point_numbers_is_refused(dtype: DType) -> None:
    with pytest.raises(InputError, match="shown cannot mask time; a mask is a bool or integer input over"):
        with_masks_of(dtype)


def test_half_precision_changes_floats_and_nothing_else() -> None:
    half = SIGNATURE.of_floats("float16")
    assert [tensor.dtype for tensor in half.inputs] == ["float16", "int64", "float16", "bool", "bool"]
    assert half.of_floats("bfloat16") == half, "of float32 alone"


# ---- dimensions


def test_dims_are_the_same_in_any_order_and_keep_their_own() -> None:
    turned = Dims(dict(reversed(list(LAYER_DIMS.items()))))
    assert turned == LAYER_DIMS
    assert hash(turned) == hash(LAYER_DIMS)
    assert list(turned) == ["context_len", "x_len", "batch"]
    assert str(Dims(n=DimRange(1, 2, 3), m=DimRange(4, 5, 6))) == "n 1 to 3, m 4 to 6"


@pytest.mark.parametrize("shape", [(1,), (1, 2), (1, 2, 3, 4)])
def test_a_shape_has_one_size_for_each_dimension(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="give 3 sizes, of batch, x_len, context_len"):
        LAYER_DIMS.named(shape)


@given(st.lists(st.fixed_dictionaries({"n": ranges, "m": ranges}).map(Dims), min_size=1, max_size=4).map(tuple))
def test_the_hull_of_profiles_holds_each_of_them_and_no_more(profiles: tuple[Dims, ...]) -> None:
    widest = hull(profiles)
    for name in widest:
        assert widest[name].min == min(profile[name].min for profile in profiles)
        assert widest[name].max == max(profile[name].max for profile in profiles)
        assert widest[name].opt == profiles[0][name].opt
    assert all(widest.holds(profile.at(which)) for profile in profiles for which in ("min", "opt", "max"))
