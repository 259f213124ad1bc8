"""What a request may look like: each refusal names the input, the axis, what it got, what is allowed and the way out."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.layers import make_spec

from bca_deploy.errors import InputError
from bca_deploy.session.contract import Contract
from bca_deploy.signature import DimRange, Dims, DType
from bca_deploy.spec import Bias, Interface, layer_signature

DIMS = Dims(batch=DimRange(1, 2, 4), x_len=DimRange(2, 8, 16), context_len=DimRange(1, 8, 12))


def contract(bias: Bias = "none", masks: bool = True, dtype: DType = "float32") -> Contract:
    return Contract(layer_signature(make_spec(), Interface(masks, masks, bias), DIMS).of_floats(dtype))


def pair(batch: int = 2, x_len: int = 5, context_len: int = 3, dtype: str = "float32") -> dict[str, Any]:
    return {"x": np.ones((batch, x_len, 24), dtype), "context": np.ones((batch, context_len, 16), dtype)}


@given(st.integers(1, 4), st.integers(2, 16), st.integers(1, 12))
def test_every_size_in_range_passes_and_masks_left_out_are_all_true(batch: int, x_len: int, context_len: int) -> None:
    given_ = pair(batch, x_len, context_len)
    ready = contract().check(given_)
    assert ready["x"] is given_["x"]  # no copy
    assert ready["mask"].shape == (batch, x_len)
    assert ready["context_mask"].shape == (batch, context_len)
    assert ready["mask"].all()
    assert ready["context_mask"].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "input x is missing; the model takes x, context, mask, context_mask"),
        ({"y": np.ones(2)}, "the model has no input 'y'"),
        ({"contxt": np.ones(2)}, r"the model has no input 'contxt' \(did you mean 'context'\?\)"),
        ({"x": np.ones((5, 24), np.float32)}, r"input x has 2 axes \[5, 24\], and needs 3: \[batch, x_len, 24\]"),
        ({"x": np.ones((2, 5, 23), np.float32)}, r"input x: axis 2 is 23, and must be 24: \[batch, x_len, 24\]"),
        (
            {"x": np.ones((2, 17, 24), np.float32)},
            r"input x: axis 1 \(x_len\) is 17, allowed 2 to 16; a sequence cannot be cut, as each row",
        ),
        ({"x": np.ones((2, 0, 24), np.float32)}, r"input x: axis 1 \(x_len\) is 0, allowed 2 to 16"),
        ({"x": np.ones((0, 5, 24), np.float32)}, r"input x: axis 0 \(batch\) is 0, allowed 1 to 4"),
        ({"context": np.ones((3, 3, 16), np.float32)}, r"input context: axis 0 \(batch\) is 3, but x has 2; they must agree"),
        ({"mask": np.ones((2, 4), bool)}, r"input mask: axis 1 \(x_len\) is 4, but x has 5; they must agree"),
        ({"mask": np.ones((2, 5), np.int64)}, "input mask has dtype int64, and needs bool; cast=True converts it"),
        ({"mask": np.ones((2, 5), np.float32)}, "input mask has dtype float32, and needs bool; cast=True converts it$"),
        ({"mask": np.ones((2, 5), complex)}, "input mask has dtype complex128, and needs bool$"),
        ({"x": np.ones((2, 5, 24), np.float64)}, "input x has dtype float64, and needs float32; cast=True converts it"),
        ({"x": np.ones((2, 5, 24), np.int32)}, "input x has dtype int32, and needs float32$"),
        ({"x": np.ones((2, 5, 24), complex)}, "input x has dtype complex128, and needs float32$"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(change: dict[str, Any], message: str) -> None:
    subject = contract()
    with pytest.raises(InputError, match=message):
        subject.check(subject.bind((), pair() | change))


def test_inputs_come_by_position_in_the_models_order_or_by_name() -> None:
    subject, arrays = contract(), pair()
    assert list(subject.bind((arrays["x"], arrays["context"]), {"mask": None})) == ["x", "context"]
    with pytest.raises(InputError, match="input x is given twice, by position and by name"):
        subject.bind((arrays["x"],), {"x": arrays["x"]})
    with pytest.raises(InputError, match="5 inputs by position, but the model takes 4: x, context, mask, context_mask"):
        subject.bind((1, 2, 3, 4, 5), {})


def test_cast_takes_other_floats_and_masks_of_zero_and_one() -> None:
    ready = contract().check(pair(dtype="float16") | {"mask": np.array([[0, 1, 1, 0, 1]] * 2)}, cast=True)
    assert ready["x"].dtype == np.float32
    assert ready["mask"].tolist() == [[False, True, True, False, True]] * 2


def test_cast_never_turns_a_number_into_infinity() -> None:
    loud = pair()
    loud["x"] = loud["x"] * 1e5
    with pytest.raises(InputError, match=r"input x holds 1e\+05, more than float16 can; scale it down"):
        contract(dtype="float16").check(loud, cast=True)


@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "a view"])
@pytest.mark.parametrize("byte", [2, 128, 255])
def test_a_mask_of_other_bytes_is_refused_also_in_shapes_seen_before(byte: int, turned: bool) -> None:
    subject, bytes_ = contract(), np.ones((5, 2), np.uint8) if turned else np.ones((2, 5), np.uint8)
    bytes_[-1, -1] = byte
    mask = bytes_.T.view(bool) if turned else bytes_.view(bool)
    for _ in range(2):
        with pytest.raises(InputError, match=f"^input mask: a bool is one byte of 0 or 1, and here is one of {byte}; write 1 "):
            subject.check(pair() | {"mask": mask})
        subject.check(pair() | {"mask": np.ones((2, 5), bool)})


def test_a_mask_of_other_integers_is_refused_even_with_cast() -> None:
    with pytest.raises(InputError, match="must hold 0 and 1 alone, and it holds 2"):
        contract().check(pair() | {"mask": np.full((2, 5), 2)}, cast=True)


def test_a_bias_the_model_has_must_be_there_and_fit() -> None:
    subject = contract(bias="shared")
    with pytest.raises(InputError, match="input rel_pos_bias is missing"):
        subject.check(pair())
    with pytest.raises(InputError, match=r"input rel_pos_bias: axis 0 is 2, and must be 3"):
        subject.check(pair() | {"rel_pos_bias": np.ones((2, 5, 3), np.float32)})
    assert subject.check(pair() | {"rel_pos_bias": np.ones((3, 5, 3), np.float32)})
