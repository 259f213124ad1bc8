"""Scheduling of many pairs: properties over random lengths."""

from hypothesis import given
from hypothesis import strategies as st

from bca_deploy.session.many import Load, schedule

lengths = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 600), st.integers(1, 600)), min_size=1, max_size=40)


def loads_of(shapes: list[tuple[int, int, int]]) -> list[Load]:
    return [Load(index, batch, tuple(lengths), width=64) for index, (batch, *lengths) in enumerate(shapes)]


@given(lengths, st.integers(1, 8))
def test_every_pair_is_scheduled_once_and_what_is_dealt_out_ends_together(
    shapes: list[tuple[int, int, int]], workers: int
) -> None:
    requests = loads_of(shapes)
    together, alone = schedule(requests, workers)
    assert sorted(together + alone) == list(range(len(shapes)))
    loads = [0.0] * workers
    for index in alone:
        loads[loads.index(min(loads))] += requests[index].cost
    assert max(loads) <= 1.1 * sum(loads) / workers + 1e-9


def test_one_large_pair_among_small_ones_gets_all_threads() -> None:
    together, alone = schedule(loads_of([(1, 16, 16)] * 8 + [(1, 2048, 2048)]), 2)
    assert together == [8]
    assert len(alone) == 8


def test_three_equal_pairs_on_two_workers_are_one_together_and_two_alone() -> None:
    together, alone = schedule(loads_of([(1, 256, 256)] * 3), 2)
    assert (len(together), len(alone)) == (1, 2)


def test_pairs_that_keep_every_thread_busy_run_one_after_another() -> None:
    assert schedule(loads_of([(1, 512, 512)] * 4), 2) == ([0, 1, 2, 3], [])
