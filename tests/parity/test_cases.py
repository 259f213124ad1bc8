"""The parity matrix: every way to go wrong has cases enough to show it, for the smallest layer too."""

from collections import Counter
from dataclasses import replace

import pytest

from bca_deploy.parity.cases import LEAST_CASES, matrix
from bca_deploy.signature import DimRange, Dims
from bca_deploy.spec import Interface, LayerSpec

SHORT = DimRange(1, 2, 3)


@pytest.mark.parametrize("scope", ["quick", "full"])
@pytest.mark.parametrize("batch", [DimRange(1, 1, 1), DimRange(1, 2, 4), DimRange(1, 4, 16)])
@pytest.mark.parametrize("heads", [1, 3, 16])
def test_few_heads_and_rows_get_as_many_opposed_logits_as_many(scope: str, batch: DimRange, heads: int) -> None:
    spec = LayerSpec(dim=8, context_dim=8, heads=heads, dim_head=8)
    cases = matrix(spec, Interface(), Dims(batch=batch, x_len=SHORT, context_len=SHORT), scope)  # type: ignore[arg-type]
    logits = Counter[tuple[int, int]]()
    for case in cases:
        logits[case.x_len, case.context_len] += case.batch * heads if case.family == "opposed" else 0
    assert len(set(cases)) == len(cases) >= LEAST_CASES[scope]  # type: ignore[index]
    assert min(logits.values()) >= 32


def test_more_opposed_cases_take_no_place_of_others() -> None:
    spec, dims = (
        LayerSpec(dim=8, context_dim=8, heads=1, dim_head=8),
        Dims(batch=DimRange(1, 1, 1), x_len=SHORT, context_len=SHORT),
    )
    few, many = (matrix(replace(spec, heads=heads), Interface(), dims, "quick") for heads in (1, 32))
    assert [case for case in few if case.family != "opposed"] == [case for case in many if case.family != "opposed"]
