"""Growth exponents: those of a power law are found, and what says nothing gives none."""

from typing import Any

import pytest

from bca_deploy.benchmarking.growth import exponent, growth_of
from bca_deploy.benchmarking.result import Measurement, Ratio
from bca_deploy.signature import DimRange, Dims, Signature, Tensor

DIMS = Dims(batch=DimRange(1, 1, 8), n=DimRange(1, 8, 512), m=DimRange(1, 8, 512))
SIGNATURE = Signature((Tensor("a", "float32", ("batch", "n", 4)), Tensor("b", "float32", ("batch", "m", 4))), (), DIMS, "batch")


def measured(shape: tuple[int, ...], ms: float, mb: float, **more: Any) -> Measurement:
    ratio = Ratio(median=1.0, low=1.0, high=1.0, rounds=1)
    times = {"min_ms": ms, "p50_ms": ms, "p90_ms": ms, "p99_ms": ms, "pairs_per_s": 1.0, "runs": 1}
    how: dict[str, Any] = {"contender": "eager", "precision": "fp32", "threads": 1, **more}
    return Measurement(shape=shape, **how, **times, peak_rss_mb=mb, call_mb=mb, ratio=ratio, interleaved=True)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_the_exponent_of_a_power_law_is_found(power: float) -> None:
    sizes = [16.0, 64.0, 512.0]
    assert exponent(sizes, [0.3 * size**power for size in sizes]) == pytest.approx(power, abs=1e-3)


def test_one_size_has_none() -> None:
    assert exponent([4.0, 4.0], [1.0, 2.0]) is None
    assert growth_of([measured((1, 8, 8), 1.0, 9.0)], SIGNATURE) == ()


def test_only_lengths_are_grown_over_each_batch_apart() -> None:
    cells = [measured((b, n, n), 0.1 * n**2 * b, 2.0 * n, threads=t) for t in (1, 2) for b in (1, 4) for n in (8, 16, 64)]
    found = growth_of(cells, SIGNATURE)
    assert [(g.threads, g.batch, g.lengths) for g in found] == [(t, b, (8.0, 16.0, 64.0)) for t in (1, 2) for b in (1, 4)]
    assert all(g.time_exponent == pytest.approx(2.0) for g in found)
    assert all(g.memory_exponent == pytest.approx(1.0) for g in found)


def test_memory_below_a_megabyte_says_nothing() -> None:
    (found,) = growth_of([measured((1, n, n), float(n), mb) for n, mb in ((8, 0.2), (16, 0.1), (64, 5.0))], SIGNATURE)
    assert found.memory_exponent is None
    assert found.time_exponent == pytest.approx(1.0)


def test_unequal_lengths_count_by_their_geometric_mean() -> None:
    (found,) = growth_of([measured((1, 4, 16), 1.0, 0.0), measured((1, 32, 32), 4.0, 0.0)], SIGNATURE)
    assert found.lengths == (8.0, 32.0)
    assert found.time_exponent == pytest.approx(1.0)
