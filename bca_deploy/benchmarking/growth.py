"""How time and memory grow with the lengths: the exponent of a power law, fitted by least squares on logarithms."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import exp

import numpy as np

from bca_deploy.benchmarking.result import Growth, Measurement
from bca_deploy.signature import Signature

# Below this an allocator's steps are all that shows.
_LEAST_MB = 1.0


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Return k of ``values ~ sizes**k``; None where there are not two sizes."""
    if len(set(sizes)) < 2:
        return None
    slope, _ = np.polyfit(np.log(sizes), np.log(values), 1)
    return round(float(slope), 3)


def growth_of(measurements: Iterable[Measurement], signature: Signature) -> tuple[Growth, ...]:
    """Return the growth of every contender over the cells that differ in lengths alone."""

    def key(m: Measurement) -> tuple[str, str, int, int]:
        return m.contender, m.precision, m.threads, signature.entries(signature.dims.named(m.shape))

    grouped = groupby(sorted(measurements, key=key), key)
    found = (_fitted(list(cells), batch, signature) for (*_, batch), cells in grouped)
    return tuple(growth for growth in found if growth is not None)


def _fitted(cells: Sequence[Measurement], batch: int, signature: Signature) -> Growth | None:
    by_length = {_length(signature.dims.named(m.shape), signature): m for m in cells}
    lengths = sorted(by_length)
    time_exponent = exponent(lengths, [by_length[length].p50_ms for length in lengths])
    if time_exponent is None:
        return None
    large = [length for length in lengths if by_length[length].call_mb >= _LEAST_MB]
    return Growth(
        contender=cells[0].contender,
        precision=cells[0].precision,
        threads=cells[0].threads,
        batch=batch,
        lengths=tuple(lengths),
        time_exponent=time_exponent,
        memory_exponent=exponent(large, [by_length[length].call_mb for length in large]),
    )


def _length(sizes: Mapping[str, int], signature: Signature) -> float:
    lengths = [sizes[name] for name in signature.lengths] or [1]
    return round(exp(float(np.mean(np.log(lengths)))), 3)
