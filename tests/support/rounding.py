"""How far apart two right evaluations of one small layer may be.

Nothing fixes the bits of a result: PyTorch and onnxruntime take another kernel, and so another order of summing, for another
alignment in memory, another number of threads or another processor. Even two calls with the same arrays may differ.
"""

from typing import Any

import numpy as np

from bca_deploy.spec import UNIT_ROUNDOFF, Precision

#: The largest |logit| of the layers of conftest.py and of fixtures/format1 on normal inputs; test_rounding.py holds it.
LARGEST_LOGIT = 2.0
#: The longest dot product of those layers.
WIDEST = 24


def rounding(precision: Precision, largest_logit: float) -> float:
    """Return what rounding alone may do to a result, relative to its largest value; see roundoff_slack in parity/trial.py."""
    logits = 4 * UNIT_ROUNDOFF[precision] * (1 + largest_logit)
    return float(logits + UNIT_ROUNDOFF["fp32"] * np.sqrt(WIDEST / 6))


def allowance(precision: Precision) -> float:
    """Return how far two results may be apart, relative to the largest value: each by as much as rounding does."""
    return 2 * rounding(precision, LARGEST_LOGIT)


def is_same(got: Any, wanted: Any, precision: Precision = "fp32") -> bool:
    """Whether two arrays, of NumPy or PyTorch, are the same result."""
    one, other = (np.asarray(a.detach() if hasattr(a, "detach") else a) for a in (got, wanted))
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    worst = np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0.0)
    return bool(worst <= allowance(precision) * np.abs(other).astype(np.float64).max(initial=0.0))


def assert_same(got: Any, wanted: Any, precision: Precision = "fp32") -> None:
    """Hold all outputs of two calls to be the same results."""
    for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert is_same(one, other, precision), (index, one, other)
