"""The sizes that a model is traced with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bca_deploy.signature import DimRange, Dims
from bca_deploy.whole.traceable import distinct_sizes


@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(20, 3000)), min_size=1, max_size=6))
def test_sizes_are_within_their_ranges_different_and_none_is_one(ranges: list[tuple[int, int]]) -> None:
    dims = Dims({f"d{index}": DimRange(low, low, low + more) for index, (low, more) in enumerate(ranges)})
    sizes = distinct_sizes(dims)
    assert dims.holds(sizes)
    assert len(set(sizes.values())) == len(sizes)
    assert min(sizes.values()) > 1


@pytest.mark.parametrize(("low", "high", "size"), [(64, 2048, 64), (1, 1, 1), (30, 30, 30), (1, 2, 2)])
def test_a_size_is_small_whatever_the_range(low: int, high: int, size: int) -> None:
    assert distinct_sizes(Dims(length=DimRange(low, low, high))) == {"length": size}
