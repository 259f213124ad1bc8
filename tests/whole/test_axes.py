"""Which axes are dynamic, what they are called, and how large they may be."""

import pytest
import torch

from bca_deploy.errors import InputError
from bca_deploy.signature import DimRange
from bca_deploy.whole.axes import Axes, GivenAxes, axes_of, ranges_of, sizes_of
from bca_deploy.whole.samples import Sample


def sample(**shapes: tuple[int, ...]) -> Sample:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


ONE = sample(video=(3, 5, 8), audio=(3, 7, 4), mask=(3, 5))
OTHER = sample(video=(2, 4, 8), audio=(2, 6, 4), mask=(2, 4))
NAMED: Axes = {"video": ("batch", "video_len", 8), "audio": ("batch", "audio_len", 4), "mask": ("batch", "video_len")}


def test_what_differs_between_two_samples_is_dynamic_and_what_agrees_shares_a_name() -> None:
    assert axes_of([ONE, OTHER]) == NAMED
    assert axes_of([OTHER, ONE]) == NAMED


def test_more_samples_tell_axes_apart() -> None:
    first, second = sample(a=(2, 5), b=(2, 5)), sample(a=(3, 7), b=(3, 7))
    assert axes_of([first, second])["b"] == ("batch", "a_len")
    assert axes_of([first, second, sample(a=(3, 7), b=(3, 8))])["b"] == ("batch", "b_len")


def test_an_input_with_two_dynamic_axes_has_their_numbers() -> None:
    found = axes_of([sample(image=(2, 3, 8, 9)), sample(image=(1, 3, 6, 5))])
    assert found == {"image": ("batch", 3, "image_2", "image_3")}


def test_first_axes_of_other_sizes_are_no_second_batch() -> None:
    found = axes_of([sample(image=(2, 8), text=(5, 8)), sample(image=(3, 8), text=(7, 8))])
    assert found == {"image": ("batch", 8), "text": ("text_0", 8)}


def test_an_input_without_axes_and_samples_of_one_size() -> None:
    assert axes_of([sample(x=(2, 3), scale=()), sample(x=(4, 3), scale=())]) == {"x": ("batch", 3), "scale": ()}
    assert axes_of([ONE, ONE]) == {name: tuple(tensor.shape) for name, tensor in ONE.items()}


def test_one_sample_takes_the_axes_that_are_given() -> None:
    given: GivenAxes = {"video": ("batch", "n", None), "audio": ["batch", "m", 4]}
    assert axes_of([ONE], given) == {"video": ("batch", "n", 8), "audio": ("batch", "m", 4), "mask": (3, 5)}


def test_given_names_go_before_those_that_samples_suggest_and_are_shared() -> None:
    found = axes_of([ONE, OTHER], {"video": ("clips", "frames", None)})
    assert found == {"video": ("clips", "frames", 8), "audio": ("clips", "audio_len", 4), "mask": ("clips", "frames")}


def test_two_names_may_have_the_same_sizes() -> None:
    pair = [sample(x=(2, 5), context=(2, 5)), sample(x=(3, 7), context=(3, 7))]
    found = axes_of(pair, {"x": ("batch", "x_len"), "context": ("batch", "context_len")})
    assert found == {"x": ("batch", "x_len"), "context": ("batch", "context_len")}


def test_a_name_that_is_taken_is_not_given_twice() -> None:
    found = axes_of([sample(a=(2, 5), b=(2, 9)), sample(a=(3, 7), b=(3, 8))], {"a": ("batch", "b_len")})
    assert found == {"a": ("batch", "b_len"), "b": ("batch", "b_1")}


@pytest.mark.parametrize(
    ("samples", "given", "message"),
    [
        ([ONE], None, r"one sample does not show which axes are dynamic; give a second one .*\(\"batch\", \"x_len\", None\)"),
        (
            [ONE, sample(video=(2, 4, 8), audio=(2, 6, 4))],
            None,
            "sample 1 and sample 2 do not have the same inputs: mask is in",
        ),
        (
            [ONE, {**OTHER, "mask": torch.zeros(2, 4, dtype=torch.bool)}],
            None,
            "input mask has 2 axes of torch.float32 in sample 1, and 2 of torch.bool in sample 2",
        ),
        ([ONE, {**OTHER, "mask": torch.zeros(2)}], None, "input mask has 2 axes of .*, and 1 of torch.float32 in sample 2"),
        ([sample(x=(2, 0)), sample(x=(3, 1))], None, r"input x has shape \[2, 0\] in sample 1; a sample has no empty axis"),
        ([sample(x=(2, 1)), sample(x=(3, 0))], None, r"input x has shape \[3, 0\] in sample 2; a sample has no empty axis"),
        ([ONE], {"vidoe": ("batch",)}, r"axes are given for 'vidoe', which no sample has \(did you mean 'video'\?\)"),
        ([ONE], {"video": ("batch", "n")}, r"axes of video: 2 are given, and the samples have \[3, 5, 8\]"),
        ([ONE], {"video": ("batch", "n", 9)}, "axes of video: axis 2 is to be 9, and is 8 in sample 1"),
        ([ONE], {"video": ("batch", "2n", None)}, "axes of video: axis 1 is '2n'; a dimension's name is a word, such as x_len"),
        ([ONE], {"video": ("batch", "", None)}, "axes of video: axis 1 is ''; a dimension's name is a word"),
        ([ONE], {"video": ("batch", "lambda", None)}, "axes of video: axis 1 is 'lambda'; a dimension's name is a word"),
        (
            [ONE, OTHER],
            {"video": ("batch", None, None)},
            "input video: axis 1 is fixed and is 5 in one sample, 4 in another; name it in axes",
        ),
        (
            [ONE],
            {"video": ("batch", "n", None), "audio": ("batch", "n", None)},
            r"input audio: axis 1 \(n\) is 7, but video has 5 in the same sample; they must agree, or have names",
        ),
        ([ONE], {"video": ("batch", "n", "batch")}, r"input video: axis 2 \(batch\) is 8, but video has 3 in the same sample"),
    ],
)
def test_contradictions_are_refused_by_tensor_and_axis(samples: list[Sample], given: GivenAxes | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        axes_of(samples, given)


# ---- ranges


def test_sizes_have_the_names_of_their_dimensions() -> None:
    assert sizes_of(ONE, NAMED) == {"batch": 3, "video_len": 5, "audio_len": 7}


def test_a_dimension_without_a_range_has_1_the_largest_sample_s_size_and_four_times_that() -> None:
    given = {"audio_len": DimRange(2, 6, 9)}
    dims, guessed = ranges_of([OTHER, ONE], NAMED, given)
    assert dict(dims) == {"batch": DimRange(1, 3, 12), "video_len": DimRange(1, 5, 20), "audio_len": DimRange(2, 6, 9)}
    assert list(dims) == ["batch", "video_len", "audio_len"]
    assert guessed == ("batch", "video_len")


def test_fixed_axes_have_no_range() -> None:
    dims, guessed = ranges_of([ONE], axes_of([ONE, ONE]), {})
    assert (dict(dims), guessed) == ({}, ())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"vide_len": DimRange(1, 2, 3)},
            r"there is no dimension 'vide_len' \(did you mean 'video_len'\?\); there are batch, video_len, audio_len",
        ),
        ({"video_len": DimRange(1, 2, 4)}, "video_len is 5 in sample 1, and is to be 1 to 4"),
        ({"video_len": DimRange(5, 6, 8)}, "video_len is 4 in sample 2, and is to be 5 to 8"),
    ],
)
def test_a_range_that_does_not_fit_is_refused(given: dict[str, DimRange], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ranges_of([ONE, OTHER], NAMED, given)


def test_a_range_where_every_axis_is_fixed_is_refused() -> None:
    with pytest.raises(InputError, match="there is no dimension 'batch'; there are none"):
        ranges_of([ONE], axes_of([ONE, ONE]), {"batch": DimRange(1, 2, 3)})
