"""Requests of different lengths in one padded run: which, how, and apart again; for `run_many` and for Triton's front."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.spec import Dims

Arrays = dict[str, NDArray[Any]]
#: Batch, length of ``x``, length of ``context``.
Shape = tuple[int, int, int]

#: The input that each output is as long as.
_LENGTHS = {"out": "x", "context_out": "context"}

#: Of all rows of a run, at most this share is padding.
PADDING = 0.25


def grouped(shapes: Mapping[int, Shape], profiles: Sequence[Dims]) -> list[list[int]]:
    """Return the requests of each run, every request once.

    Sorted by one length the other is mixed, so requests are put into bands of similar ``x`` and sorted by ``context`` there:
    64 pairs of independent lengths, 16 to 512, at most 8 in a run, take 12 runs instead of 19 (mean of 50 draws). How many
    bands are best depends on the lengths; a few are tried.

    Args:
        shapes: of the requests.
        profiles: what one run may hold: each fits one of them.
    """
    return min((_banded(shapes, profiles, bands) for bands in (1, 2, 3)), key=len)


def _banded(shapes: Mapping[int, Shape], profiles: Sequence[Dims], bands: int) -> list[list[int]]:
    longest = max((x_len for _, x_len, _ in shapes.values()), default=1)

    def order(index: int) -> tuple[int, int, int]:
        _, x_len, context_len = shapes[index]
        return (x_len - 1) * bands // longest, context_len, x_len

    groups: list[list[int]] = []
    for index in sorted(shapes, key=order):
        if not (groups and _fits([shapes[i] for i in (*groups[-1], index)], profiles)):
            groups.append([])
        groups[-1].append(index)
    return groups


def _fits(shapes: Iterable[Shape], profiles: Sequence[Dims]) -> bool:
    batches, x_lens, context_lens = zip(*shapes, strict=True)
    run = {"batch": sum(batches), "x_len": max(x_lens), "context_len": max(context_lens)}
    full = run["batch"] * (run["x_len"] + run["context_len"])
    real = sum(b * (n + m) for b, n, m in zip(batches, x_lens, context_lens, strict=True))
    return full - real <= PADDING * full and any(profile.holds(run) for profile in profiles)


def stacked(group: Sequence[Mapping[str, NDArray[Any]]]) -> Arrays:
    """Return the checked inputs of several requests as one batch; what is added to the shorter ones is false in the masks."""
    batch: Arrays = {}
    for name, first in group[0].items():
        length = max(ready[name].shape[1] for ready in group)
        full = np.zeros((sum(len(ready[name]) for ready in group), length, *first.shape[2:]), first.dtype)
        start = 0
        for ready in group:
            full[start : start + len(ready[name]), : ready[name].shape[1]] = ready[name]
            start += len(ready[name])
        batch[name] = full
    return batch


def cut(outputs: Mapping[str, NDArray[Any]], group: Sequence[Mapping[str, NDArray[Any]]]) -> list[Arrays]:
    """Return each request's outputs from those of the batch; copies, so that one kept result does not keep the batch."""
    found, start = [], 0
    for ready in group:
        end = start + len(ready["x"])
        found.append({name: outputs[name][start:end, : ready[of].shape[1]].copy() for name, of in _LENGTHS.items()})
        start = end
    return found
