"""Many pairs of different lengths: padded into batches where a GPU likes that, side by side on single threads on a CPU."""

from collections.abc import Sequence
from dataclasses import dataclass

#: Pairs with more rows than this keep all threads busy by themselves. Side by side against one after another, onnxruntime 1.32
#: on 2 cores, dims 512/386: 1.17x at 2 x 128 rows, 1.13x at 2 x 256, 1.01x at 2 x 512.
ALONE_ROWS = 768

#: Of all rows of a batch, at most this share is padding.
PADDING = 0.25


@dataclass(frozen=True)
class Size:
    """What one pair costs.

    Attributes:
        index: its place among the requests.
        batch: pairs in it.
        x_len: length of ``x``.
        context_len: length of ``context``.
        width: features of a row, for the cost.
    """

    index: int
    batch: int
    x_len: int
    context_len: int
    width: int

    @property
    def rows(self) -> int:
        """Rows of both sequences."""
        return self.batch * (self.x_len + self.context_len)

    @property
    def cost(self) -> float:
        """Multiplications, up to a factor: projections go with the rows, attention with the product of the lengths."""
        return self.batch * ((self.x_len + self.context_len) * 2.0 * self.width + 2.0 * self.x_len * self.context_len)


def buckets(sizes: Sequence[Size], largest_batch: int) -> list[list[int]]:
    """Group pairs for padding: similar lengths together, at most ``PADDING`` of each group's rows padding.

    Args:
        sizes: of the requests.
        largest_batch: pairs that one call may hold.

    Returns:
        Indices of the requests of each group, every request once.
    """
    groups: list[list[Size]] = []
    for size in sorted(sizes, key=lambda s: (s.x_len, s.context_len)):
        if not (groups and _fits([*groups[-1], size], largest_batch)):
            groups.append([])
        groups[-1].append(size)
    return [[size.index for size in group] for group in groups]


def _fits(group: list[Size], largest_batch: int) -> bool:
    pairs = sum(size.batch for size in group)
    full = pairs * (max(s.x_len for s in group) + max(s.context_len for s in group))
    real = sum(size.batch * (size.x_len + size.context_len) for size in group)
    return pairs <= largest_batch and full - real <= PADDING * full


def schedule(sizes: Sequence[Size], workers: int) -> tuple[list[int], list[int]]:
    """Say which requests to run one after another on all threads, and which side by side on one thread each.

    Side by side is the more efficient for small requests, as long as the workers end together. So the largest are taken out,
    to be run on all threads, until the rest can be dealt out evenly (within a tenth; longest first, Graham's rule).

    Args:
        sizes: of the requests.
        workers: threads.

    Returns:
        Indices for all threads together, and indices for one thread each, longest first.
    """
    rest = sorted(sizes, key=lambda size: -size.cost)
    together: list[int] = []
    while rest and (rest[0].rows > ALONE_ROWS or not _even([size.cost for size in rest], workers)):
        together.append(rest.pop(0).index)
    return together, [size.index for size in rest]


def _even(costs: list[float], workers: int) -> bool:
    loads = [0.0] * workers
    for cost in costs:
        loads[loads.index(min(loads))] += cost
    return max(loads) <= 1.1 * sum(costs) / workers
