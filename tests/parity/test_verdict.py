"""The pooled rule: the worse of two measures, and pools whose error few rows carry."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bca_deploy.parity.verdict import (
    DECIDED,
    OWN_INPUTS,
    CaseResult,
    PeerError,
    Region,
    RegionError,
    in_doubt,
    pool,
    pooled_limit,
    pools_of,
    problems,
)


def case(ours: float, eager: float, *in_order: float, rows: float = 1000.0, name: str = "c", **more: Any) -> CaseResult:
    """A case of 100 values with these RMS errors."""
    found = RegionError(
        count=100,
        squares=100 * ours**2,
        eager=PeerError(100 * eager**2, rows),
        in_order=tuple(PeerError(100 * order**2, rows) for order in in_order),
        mean=ours,
        p99=ours,
        max=ours,
        bound=ours,
    )
    region: Region = more.pop("region", "live")
    return CaseResult(
        name, **{"family": "padded", "sharpness": "plain", "runtime": "ort"} | more, regions={region: found}, cosine=1.0
    )


def test_a_pool_may_be_half_as_bad_again_as_eager() -> None:
    (fine,), (broken,) = pool((case(1.49, 1.0),)), pool((case(1.51, 1.0),))
    assert fine.live_ratio == pytest.approx(1.49)
    assert fine.live_limit == 1.5
    assert not problems((), (fine,))
    assert problems((), (broken,)) == ("padded plain under ort, live rows: RMS error 1.51 times PyTorch eager's, allowed 1.5",)


def test_the_measure_is_the_worse_of_both_evaluations_over_the_whole_pool() -> None:
    (group,) = pool((case(3.0, 2.0, 1.0, name="a"), case(3.0, 1.0, 3.0, name="b")))
    assert group.orders == 1
    assert group.live_ratio == pytest.approx(math.sqrt(18 / 10))
    assert not problems((), (group,))
    (group,) = pool((case(5.0, 2.0, 1.0, name="a"), case(3.0, 1.0, 3.0, name="b")))
    assert "times the worst of PyTorch eager's and of 1 orders of sums, allowed 1.5" in problems((), (group,))[0]


def test_a_case_without_sums_in_order_leaves_eager_as_the_measure() -> None:
    (group,) = pool((case(1.4, 1.0, 9.0, name="a"), case(1.4, 1.0, name="b")))
    assert group.live_ratio == pytest.approx(1.4)


def test_an_evaluation_that_is_not_finite_is_no_measure() -> None:
    (group,) = pool((case(1.4, 1.0, math.nan),))
    assert group.live_ratio == pytest.approx(1.4)
    (group,) = pool((case(1.0, math.nan),))
    assert group.live_ratio is None


@given(st.floats(1, 1e6), st.floats(1, 1e6))
def test_the_fewer_rows_carry_the_error_the_more_is_allowed(rows: float, more: float) -> None:
    fewer, most = sorted((rows, more))
    assert pooled_limit(fewer) >= pooled_limit(most) >= 1.5
    assert pooled_limit(512) == 1.5 == pooled_limit(1e6)
    assert pooled_limit(0) == pooled_limit(1) < 11


def test_rows_of_cases_are_put_together_by_what_they_carry() -> None:
    (alike,) = pool((case(1.0, 1.0, rows=8, name="a"), case(1.0, 1.0, rows=8, name="b")))
    assert alike.live_limit == pytest.approx(pooled_limit(16))
    (one,) = pool((case(1.0, 1.0, rows=8, name="a"), case(1.0, 1e-6, rows=8, name="b")))
    assert one.live_limit == pytest.approx(pooled_limit(8))


def test_only_the_pools_that_break_the_rule_are_in_doubt() -> None:
    fine, doubtful = case(1.0, 1.0, name="a"), case(2.0, 1.0, name="b", sharpness="sharp")
    assert in_doubt([fine, doubtful]) == {("padded", "sharp")}
    assert in_doubt([fine]) == set()


def test_what_is_far_beyond_its_limit_beside_sums_in_order_too_is_decided() -> None:
    far, near = 1.5 * DECIDED + 1, 1.5 * DECIDED - 1
    assert in_doubt([case(far, 1.0)]) == {("padded", "plain")}, "eager alone may be right by luck"
    assert in_doubt([case(far, 1.0, 1.0)]) == set()
    assert in_doubt([case(near, 1.0, 1.0)]) == {("padded", "plain")}
    assert in_doubt([case(far, 0.0, 0.0)]) == {("padded", "plain")}, "both may be exact by luck"
    assert in_doubt([case(far, 1.0, 1.0), case(2.0, 1.0, 1.0, family="no mask")]) == {("no mask", "plain")}


def test_dead_rows_put_their_whole_family_in_doubt() -> None:
    plain, sharp = (case(2.0, 1.0, region="dead", name=s, sharpness=s) for s in ("plain", "sharp"))
    assert in_doubt([plain, sharp, case(1.0, 1.0, family="no mask")]) == {("padded", "plain"), ("padded", "sharp")}


def test_nothing_is_in_doubt_where_something_failed_for_good() -> None:
    failed = CaseResult("n", "padded", "plain", "ort", {}, 0.0, ("out has 3 NaN or Inf",))
    assert in_doubt([case(2.0, 1.0), failed]) == set()


def test_a_users_own_inputs_are_no_pool() -> None:
    (group,) = pool((case(9.0, 1.0, family=OWN_INPUTS),))
    assert pools_of(group) == []
