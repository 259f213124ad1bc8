"""Which requests share one padded run where both of their lengths vary; for `run_many` and for Triton's front."""

from collections.abc import Iterable, Mapping, Sequence

from bca_deploy.spec import Dims

#: Batch, length of ``x``, length of ``context``.
Shape = tuple[int, int, int]

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
