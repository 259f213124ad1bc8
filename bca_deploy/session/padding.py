"""Requests of different lengths in one padded run: which, how, and apart again; for `run_many` and for Triton's front.

Only for what :attr:`bca_deploy.signature.Signature.pads` allows.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.signature import Dims, Signature

Arrays = dict[str, NDArray[Any]]
#: Of each named dimension.
Sizes = Mapping[str, int]

#: Of all rows of a run, at most this share is padding.
PADDING = 0.25


def grouped(requests: Mapping[int, Sizes], signature: Signature, profiles: Sequence[Dims]) -> list[list[int]]:
    """Return the requests of each run, every request once.

    Sorted by one length the others are mixed, so requests are put into bands of a similar first length and sorted by the
    others there: 64 pairs of independent lengths, 16 to 512, at most 8 in a run, take 12 runs instead of 19 (mean of 50
    draws). How many bands are best depends on the lengths; a few are tried.

    Args:
        requests: the sizes of each.
        signature: of the model.
        profiles: what one run may hold: each fits one of them.
    """
    return min((_banded(requests, signature, profiles, bands) for bands in (1, 2, 3)), key=len)


def _banded(requests: Mapping[int, Sizes], signature: Signature, profiles: Sequence[Dims], bands: int) -> list[list[int]]:
    first, others = signature.lengths[:1], signature.lengths[1:]
    longest = max((sizes[name] for sizes in requests.values() for name in first), default=1)

    def order(index: int) -> tuple[int, ...]:
        sizes = requests[index]
        band = [(sizes[name] - 1) * bands // longest for name in first]
        return (*band, *(sizes[name] for name in (*others, *first)))

    groups: list[list[int]] = []
    for index in sorted(requests, key=order):
        if not (groups and _fits([requests[i] for i in (*groups[-1], index)], signature, profiles)):
            groups.append([])
        groups[-1].append(index)
    return groups


def _fits(requests: Sequence[Sizes], signature: Signature, profiles: Sequence[Dims]) -> bool:
    run = together(requests, signature)
    full, real = signature.rows(run), sum(map(signature.rows, requests))
    return full - real <= PADDING * full and any(profile.holds(run) for profile in profiles)


def together(requests: Sequence[Sizes], signature: Signature) -> dict[str, int]:
    """Return the sizes of one run of several requests: their entries, and the longest of each length."""
    run = {name: max(sizes[name] for sizes in requests) for name in signature.lengths}
    return run if signature.batch is None else {signature.batch: sum(map(signature.entries, requests)), **run}


def stacked(group: Sequence[Mapping[str, NDArray[Any]]], signature: Signature) -> Arrays:
    """Return the checked inputs of several requests as one batch; what is added to the shorter ones is false in the masks."""
    sizes = [signature.sizes(ready) for ready in group]
    run = together(sizes, signature)
    batch = {t.name: np.zeros(t.shape(run), group[0][t.name].dtype) for t in signature.inputs}
    for ready, first in zip(group, _starts(sizes, signature), strict=True):
        for name, full in batch.items():
            full[_place(ready[name].shape, first)] = ready[name]
    return batch


def cut(outputs: Mapping[str, NDArray[Any]], requests: Sequence[Sizes], signature: Signature) -> list[Arrays]:
    """Return each request's outputs from those of the batch; copies, so that one kept result does not keep the batch."""
    return [
        {t.name: outputs[t.name][_place(t.shape(sizes), first)].copy() for t in signature.outputs}
        for sizes, first in zip(requests, _starts(requests, signature), strict=True)
    ]


def _starts(requests: Iterable[Sizes], signature: Signature) -> list[int]:
    """Return the first entry of each request in the batch."""
    starts, end = [], 0
    for sizes in requests:
        starts.append(end)
        end += signature.entries(sizes)
    return starts


def _place(shape: tuple[int, ...], first: int) -> tuple[slice, ...]:
    """Return where a tensor of one request lies in the batch's."""
    return (slice(first, first + shape[0]), *(slice(size) for size in shape[1:]))
