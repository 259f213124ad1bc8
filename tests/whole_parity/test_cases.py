"""The matrix of a whole model: sizes of every kind, masks of every pattern, and pools that are large enough."""

import math

import pytest
import torch

from bca_deploy.signature import Axis, DimRange, Dims, Signature, Tensor
from bca_deploy.whole.draws import PATTERNS, Draws
from bca_deploy.whole_parity.cases import POOL_VALUES, Case, cases_of, inputs_of

X, MASK = Tensor("x", "float32", ("batch", "n", 3)), Tensor("mask", "bool", ("batch", "n"))
DIMS = Dims(batch=DimRange(1, 2, 8), n=DimRange(1, 7, 40))


def signature(*outputs: tuple[Axis, ...], dims: Dims = DIMS, batch: str | None = "batch") -> Signature:
    made = tuple(Tensor(f"out_{index}", "float32", axes) for index, axes in enumerate(outputs))
    return Signature((X, MASK), made, dims, batch)


def draws(masked: bool = True) -> Draws:
    return Draws((X, MASK), ("mask",) if masked else (), {})


def values(cases: list[Case], axes: tuple[Axis, ...]) -> int:
    return sum(math.prod(Tensor("out", "float32", axes).shape(dict(case.sizes))) for case in cases if case.sample is None)


SAMPLES = [{"x": torch.ones(2, 5, 3), "mask": torch.ones(2, 5, dtype=torch.bool)}] * 2


def test_the_samples_come_first_and_every_pattern_has_every_kind_of_sizes() -> None:
    cases = cases_of(draws(), signature(("batch", "n", 64)), SAMPLES, "quick")
    assert [case.sample for case in cases[:3]] == [0, 1, None]
    drawn = cases[2:]
    assert {case.pattern for case in drawn} == set(PATTERNS)
    lengths = {dict(case.sizes)["n"] for case in drawn}
    assert {1, 3, 6, 7} == lengths
    assert all(dict(case.sizes)["batch"] == 4 for case in drawn)
    assert len({case.name for case in cases}) == len(cases)


def test_without_masks_there_is_one_pattern() -> None:
    cases = cases_of(draws(masked=False), signature(("batch", "n", 64)), SAMPLES, "quick")
    assert {case.pattern for case in cases} == {"all live"}


@pytest.mark.parametrize("axes", [("batch", 2), ("batch",), ("batch", "n", 64), ("n",)])
def test_every_output_s_pool_has_enough_values_or_there_are_the_most_cases(axes: tuple[Axis, ...]) -> None:
    cases = cases_of(draws(), signature(("batch", "n", 64), axes), SAMPLES, "quick")
    assert values(cases, axes) >= POOL_VALUES or len(cases) >= 64


def test_a_model_of_one_number_has_the_most_cases_and_no_more() -> None:
    quick = cases_of(draws(), signature(()), [], "quick")
    full = cases_of(draws(), signature(()), [], "full")
    assert 64 <= len(quick) < 64 + 40
    assert 256 <= len(full) < 256 + 40


def test_a_full_matrix_has_more_than_a_quick_one() -> None:
    made = signature(("batch", "n", 64))
    assert len(cases_of(draws(), made, [], "full")) >= 4 * len(cases_of(draws(), made, [], "quick"))


def test_sizes_stay_within_their_ranges() -> None:
    narrow = Dims(batch=DimRange(2, 2, 3), n=DimRange(5, 6, 9))
    for case in cases_of(draws(), signature(("batch", "n", 64), dims=narrow), [], "quick"):
        assert narrow.holds(dict(case.sizes))


def test_inputs_are_the_sample_or_drawn_and_what_the_precision_holds() -> None:
    samples = [{"x": torch.full((2, 5, 3), 0.1), "mask": torch.ones(2, 5, dtype=torch.bool)}]
    own, drawn = Case("sample 1", sample=0), Case("padded", (("batch", 3), ("n", 4)), "padded", 1)
    assert inputs_of(own, draws(), samples, "fp16")["x"][0, 0, 0] == torch.tensor(0.1).half().float().item()
    assert inputs_of(own, draws(), samples, "fp32")["mask"].all()
    assert inputs_of(drawn, draws(), samples, "fp32")["x"].shape == (3, 4, 3)
