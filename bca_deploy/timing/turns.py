"""Calls timed in turn, so that whatever disturbs the machine disturbs all of them, and compared round by round."""

import time
from collections.abc import Callable, Sequence
from statistics import median

Call = Callable[[], object]
# Calls of this length and longer do not wait in vain for caches: none is made before them that is not timed.
_LONG_MS = 50.0


def turn(run: Call, at_least_ms: float = 0.0, last_ms: float = 0.0) -> list[float]:
    """Call at least once, and again until the time is over; return the milliseconds of each call.

    Args:
        run: the call.
        at_least_ms: how long to go on.
        last_ms: what a call took in the turn before; a short one is called once first to warm up what others have cooled.
    """
    if last_ms < _LONG_MS:
        run()
    times_ms, start = list[float](), time.perf_counter()
    while not times_ms or (time.perf_counter() - start) * 1e3 < at_least_ms:
        before = time.perf_counter()
        run()
        times_ms.append((time.perf_counter() - before) * 1e3)
    return times_ms


def in_turn(runs: Sequence[Call], rounds: int, at_least_ms: float = 0.0) -> list[list[float]]:
    """Give each call its turn in every round, every other round from the last to the first.

    Args:
        runs: the calls.
        rounds: that count; one more goes before them.
        at_least_ms: how long each turn goes on.

    Returns:
        For each call the median milliseconds of each round.
    """
    found: list[list[float]] = [[median(turn(run))] for run in runs]
    for number in range(rounds):
        for index in range(len(runs))[:: -1 if number % 2 else 1]:
            found[index].append(median(turn(runs[index], at_least_ms, found[index][-1])))
    return [times[1:] for times in found]


def ratios(ours_ms: Sequence[float], theirs_ms: Sequence[float]) -> list[float]:
    """Return how many times as long ours took as theirs, round by round."""
    return [ours / theirs for ours, theirs in zip(ours_ms, theirs_ms, strict=True)]
