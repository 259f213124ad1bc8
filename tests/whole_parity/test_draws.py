"""Inputs like the samples: masks of every pattern, integers of a known range, floats of the same size."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from bca_deploy.errors import InputError
from bca_deploy.signature import Axis, DType, Tensor
from bca_deploy.whole.draws import PATTERNS, Draws, Pattern, draws_of
from bca_deploy.whole.samples import Sample

SIZES = {"batch": 8, "x_len": 40, "text_len": 30}


def tensor(name: str, dtype: DType, *axes: Axis) -> Tensor:
    return Tensor(name, dtype, axes)


MASKS = (
    tensor("x_mask", "bool", "batch", "x_len"),
    tensor("text_mask", "int64", "batch", "text_len"),
    tensor("flags", "bool", "x_len"),
    tensor("on", "bool"),
)


def masks(pattern: Pattern, seed: int = 0, sizes: Mapping[str, int] = SIZES) -> dict[str, np.ndarray]:
    return Draws(MASKS, tuple(each.name for each in MASKS), {}).inputs(sizes, pattern, seed, "fp32")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_have_their_shapes_and_types_and_an_integer_mask_holds_0_and_1(pattern: Pattern) -> None:
    found = masks(pattern)
    assert {name: (a.shape, a.dtype.name) for name, a in found.items()} == {
        "x_mask": ((8, 40), "bool"),
        "text_mask": ((8, 30), "int64"),
        "flags": ((40,), "bool"),
        "on": ((), "bool"),
    }
    assert set(np.unique(found["text_mask"])) <= {0, 1}


def test_all_live_is_true_everywhere() -> None:
    assert all(mask.all() for mask in masks("all live").values())


def test_padded_is_true_up_to_a_length_of_at_least_1_in_every_entry() -> None:
    found = masks("padded")
    for name in ("x_mask", "text_mask"):
        mask = found[name].astype(bool)
        assert mask[:, 0].all()
        assert (np.diff(mask.astype(int), axis=1) <= 0).all()
        assert len(set(mask.sum(1))) > 3


def test_scattered_has_both_in_no_order() -> None:
    for name in ("x_mask", "text_mask"):
        mask = masks("scattered")[name].astype(int)
        assert 0.4 < mask.mean() < 0.8
        assert (np.diff(mask, axis=1) > 0).any()


def test_dead_rows_are_dead_in_each_mask_alone_and_in_both() -> None:
    found = masks("dead rows")
    live = {name: found[name].astype(bool).any(1) for name in ("x_mask", "text_mask")}
    ways = set(zip(live["x_mask"].tolist(), live["text_mask"].tolist(), strict=True))
    assert ways == {(True, True), (True, False), (False, True), (False, False)}
    assert not found["flags"].any()
    assert not found["on"]


def test_four_entries_have_every_way_to_be_dead() -> None:
    found = masks("dead rows", sizes={**SIZES, "batch": 4})
    ways = {(bool(x.any()), bool(text.any())) for x, text in zip(found["x_mask"], found["text_mask"], strict=True)}
    assert len(ways) == 4


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_of_one_position_and_one_entry_are_drawn(pattern: Pattern) -> None:
    found = masks(pattern, sizes={"batch": 1, "x_len": 1, "text_len": 1})
    assert found["x_mask"].shape == (1, 1)
    assert bool(found["x_mask"].all()) == (pattern in ("all live", "padded")) or pattern == "scattered"


# ---- like the samples

TENSORS = (
    tensor("video", "float32", "batch", "x_len", 3),
    tensor("tokens", "int64", "batch", "text_len"),
    tensor("mask", "bool", "batch", "x_len"),
)


def sample(seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return {
        "video": torch.randn(4, 9, 3, generator=generator) * 20 + 300,
        "tokens": torch.randint(5, 60, (4, 7), generator=generator),
        "mask": torch.ones(4, 9, dtype=torch.bool),
    }


def draws(
    masks: Mapping[str, str] | None = None, ranges: Mapping[str, tuple[int, int]] | None = None, **changes: torch.Tensor
) -> Draws:
    return draws_of([sample(), {**sample(1), **changes}, {**sample(), **changes}][1:], TENSORS, masks or {}, ranges or {})


def test_floats_are_like_the_samples_and_what_the_precision_holds() -> None:
    for precision, dtype in (("fp32", np.float32), ("fp16", np.float16)):
        drawn = draws().inputs(SIZES, "padded", 0, precision)["video"]
        assert drawn.dtype == np.float32
        assert 297 < drawn.mean() < 303
        assert 18 < drawn.std() < 22
        assert np.array_equal(drawn, drawn.astype(dtype).astype(np.float32))


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0.8, 1.2), (50.0, 40, 60)])
def test_a_constant_float_varies_all_the_same(value: float, low: float, high: float) -> None:
    drawn = draws(video=torch.full((4, 9, 3), value)).inputs(SIZES, "all live", 0, "fp32")["video"]
    assert low < drawn.std() < high


def test_integers_are_of_the_range_seen_in_all_samples() -> None:
    found = draws_of(
        [{**sample(), "tokens": torch.tensor([[7]])}, {**sample(), "tokens": torch.tensor([[9, 3]])}], TENSORS, {}, {}
    )
    assert found.integers == {"tokens": (3, 9)}
    assert set(np.unique(found.inputs(SIZES, "padded", 0, "fp32")["tokens"])) == set(range(3, 10))


def test_a_range_that_is_given_goes_before_what_was_seen() -> None:
    drawn = draws(ranges={"tokens": (0, 30521)}).inputs(SIZES, "padded", 0, "fp32")["tokens"]
    assert drawn.dtype == np.int64
    assert drawn.min() >= 0
    assert 20_000 < drawn.max() <= 30521


def test_everything_is_the_same_every_time_and_another_for_another_seed_pattern_or_size() -> None:
    first = draws().inputs(SIZES, "padded", 0, "fp32")
    again = draws().inputs(dict(reversed(SIZES.items())), "padded", 0, "fp32")
    assert all(np.array_equal(first[name], again[name]) for name in first)
    for other in (
        draws().inputs(SIZES, "padded", 1, "fp32"),
        draws().inputs(SIZES, "scattered", 0, "fp32"),
        draws().inputs({**SIZES, "x_len": 41}, "padded", 0, "fp32"),
    ):
        assert not np.array_equal(first["video"][:, :40], other["video"][:, :40])


@pytest.mark.parametrize("values", [[0, 1], [1, 1], [0, 0], [7, 7], [-1, -1]])
def test_an_integer_that_could_be_a_mask_is_refused_until_it_is_said_what_it_is(values: list[int]) -> None:
    tokens = torch.tensor([values])
    shown = ", ".join(str(value) for value in sorted(set(values)))
    with pytest.raises(
        InputError, match=f"integer input tokens holds only {shown} in the samples: say what it is, a mask "
    ) as refused:
        draws(tokens=tokens)
    assert "(--mask tokens:DIM, " in str(refused.value)
    assert "(--range tokens=0:100)" in str(refused.value)
    assert draws(masks={"tokens": "text_len"}, tokens=tokens).masks == ("tokens", "mask")
    assert draws(ranges={"tokens": (0, 9)}, tokens=tokens).integers == {"tokens": (0, 9)}


def test_an_integer_with_two_values_that_are_no_mask_s_is_none() -> None:
    assert draws(tokens=torch.tensor([[1, 2]])).integers == {"tokens": (1, 2)}


@pytest.mark.parametrize(
    ("masks", "ranges", "message"),
    [
        ({"tokns": "text_len"}, {}, r"mask 'tokns': no such integer input \(did you mean 'tokens'\?\); there are tokens"),
        ({"video": "x_len"}, {}, "mask 'video': no such integer input.*; there are tokens"),
        ({}, {"mask": (0, 1)}, "range 'mask': no such integer input.*; there are tokens"),
        ({}, {"tokens": (9, 3)}, "range 'tokens': 9 to 3"),
        (
            {"tokens": "txt_len"},
            {},
            r"mask 'tokens': it has no dimension 'txt_len' \(did you mean 'text_len'\?\); it has batch, text_len",
        ),
        ({"tokens": "text_len"}, {"tokens": (0, 9)}, "tokens is both a mask and numbers of a range"),
    ],
)
def test_what_is_said_of_inputs_that_are_not_so_is_refused(
    masks: dict[str, str], ranges: dict[str, tuple[int, int]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        draws(masks, ranges)


def test_without_an_integer_input_it_is_said_that_there_is_none() -> None:
    with pytest.raises(InputError, match="mask 'tokens': no such integer input; there are none"):
        draws_of([sample()], TENSORS[:1], {"tokens": "text_len"}, {})
