"""The queue: what waits together runs together, a full queue refuses, and nobody pays for a neighbour's mistake."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from bca_deploy.serving.queue import Batcher, BusyError, Limits

#: Only what hangs takes so many seconds.
PATIENCE_S = 300.0
HOUR_MS = 3_600_000.0


class Model:
    """A session's run_prepared that doubles numbers, holds on request, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def run_prepared(self, pairs: Sequence[Any]) -> list[tuple[Any, ...]]:
        self.batches.append([pair[0] for pair in pairs])
        assert self.gate.wait(PATIENCE_S)
        if any(pair[0] < 0 for pair in pairs):
            raise ValueError("a negative number")
        return [(pair[0] * 2,) for pair in pairs]


def run(limits: Limits, scenario: Callable[[Model, Batcher], Any]) -> Any:
    async def main() -> Any:
        model = Model()
        batcher = Batcher(model.run_prepared, limits)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await scenario(model, batcher)
        finally:
            model.gate.set()
            await batcher.close()

    return asyncio.run(main())


async def until(true: Callable[[], object]) -> None:
    """Wait for a condition; the scenario's time limit ends what never comes."""
    while not true():
        await asyncio.sleep(0.001)


async def turns() -> None:
    """Let everything on the loop go on as far as it can by itself."""
    for _ in range(20):
        await asyncio.sleep(0)


async def held(model: Model, batcher: Batcher) -> "asyncio.Task[Any]":
    """A request that occupies the model until the gate opens."""
    model.gate.clear()
    first = asyncio.create_task(batcher.submit((0,)))
    await until(lambda: model.batches)
    return first


def test_every_request_gets_its_own_result() -> None:
    async def scenario(_: Model, batcher: Batcher) -> list[Any]:
        return await asyncio.gather(*(batcher.submit((n,)) for n in range(50)))

    assert run(Limits(max_batch=7), scenario) == [(2 * n,) for n in range(50)]


def test_requests_that_come_in_during_a_batch_run_together_up_to_the_limit() -> None:
    async def scenario(model: Model, batcher: Batcher) -> list[list[int]]:
        first = await held(model, batcher)
        rest = [asyncio.create_task(batcher.submit((n,))) for n in range(1, 7)]
        await until(lambda: batcher.depth == 6)
        model.gate.set()
        await asyncio.gather(first, *rest)
        return model.batches

    assert run(Limits(max_batch=4, max_running=1), scenario) == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_batch_runs_while_another_does_and_a_third_waits() -> None:
    async def scenario(model: Model, batcher: Batcher) -> list[list[int]]:
        first = await held(model, batcher)
        rest = [asyncio.create_task(batcher.submit((n,))) for n in range(1, 4)]
        await until(lambda: len(model.batches) == 2)
        more = asyncio.create_task(batcher.submit((4,)))
        await until(lambda: batcher.depth == 2)
        await turns()
        assert (model.batches, batcher.depth) == ([[0], [1, 2]], 2)
        model.gate.set()
        await asyncio.gather(first, *rest, more)
        return model.batches

    assert run(Limits(max_batch=2), scenario) == [[0], [1, 2], [3, 4]]


def test_the_first_request_waits_for_more_as_long_as_it_may() -> None:
    async def scenario(model: Model, batcher: Batcher) -> list[list[int]]:
        first = asyncio.create_task(batcher.submit((0,)))
        await turns()
        await asyncio.gather(first, batcher.submit((1,)))
        return model.batches

    assert run(Limits(max_delay_ms=HOUR_MS, max_batch=2), scenario) == [[0, 1]]
    assert run(Limits(max_delay_ms=0, max_batch=2), scenario) == [[0], [1]]


def test_a_lone_request_runs_when_its_patience_is_over() -> None:
    async def scenario(_: Model, batcher: Batcher) -> Any:
        return await batcher.submit((4,))

    assert run(Limits(16, max_delay_ms=30), scenario) == (8,)


def test_a_full_queue_refuses_and_counts_it_and_takes_requests_again_afterwards() -> None:
    async def scenario(model: Model, batcher: Batcher) -> None:
        first = await held(model, batcher)
        waiting = [asyncio.create_task(batcher.submit((n,))) for n in (1, 2)]
        await until(lambda: batcher.depth == 2)
        with pytest.raises(BusyError, match="2 requests are waiting, and the queue takes 2; try again later"):
            await batcher.submit((3,))
        assert batcher.counts.refused == 1
        model.gate.set()
        await asyncio.gather(first, *waiting)
        assert await batcher.submit((3,)) == (6,)

    run(Limits(max_queue=2, max_running=1), scenario)


def test_one_bad_request_fails_alone() -> None:
    async def scenario(model: Model, batcher: Batcher) -> list[Any]:
        first = await held(model, batcher)
        rest = [asyncio.create_task(batcher.submit((n,))) for n in (1, -1, 2)]
        await until(lambda: batcher.depth == 3)
        model.gate.set()
        return await asyncio.gather(first, *rest, return_exceptions=True)

    results = run(Limits(16, max_running=1), scenario)
    assert results[:2] == [(0,), (2,)]
    assert isinstance(results[2], ValueError)
    assert results[3] == (4,)


def test_a_batch_that_fails_is_counted_once_and_run_again_without_those_who_gave_up() -> None:
    async def scenario(model: Model, batcher: Batcher) -> Any:
        first = await held(model, batcher)
        rest = [asyncio.create_task(batcher.submit((n,))) for n in (-1, 1, 2)]
        await until(lambda: batcher.depth == 3)
        model.gate.set()
        await first
        model.gate.clear()
        await until(lambda: len(model.batches) == 2)
        rest[1].cancel()
        await asyncio.wait([rest[1]])
        model.gate.set()
        await asyncio.gather(*rest, return_exceptions=True)
        return model.batches, batcher.counts.requests

    assert run(Limits(16, max_running=1), scenario) == ([[0], [-1, 1, 2], [-1], [2]], 4)


def test_a_model_that_gives_too_few_results_fails_its_requests_and_not_the_queue() -> None:
    async def main() -> None:
        batcher = Batcher(lambda pairs: [(1,)] * (len(pairs) - 1), Limits())
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(3):
                with pytest.raises(ValueError, match="zip"):
                    await batcher.submit((1,))
            assert not batcher.worker.done()
            await batcher.close()

    asyncio.run(main())


def test_waiting_for_the_model_counts_as_waiting() -> None:
    async def scenario(model: Model, batcher: Batcher) -> list[list[int]]:
        model.gate.clear()
        first = [asyncio.create_task(batcher.submit((n,))) for n in (0, 1)]  # as many as run without waiting for more
        await until(lambda: model.batches)
        late = asyncio.create_task(batcher.submit((2,)))
        await until(lambda: batcher.depth == 1)
        batcher._waiting[0].arrived -= HOUR_MS / 1e3  # as if the model had been at work for so long
        model.gate.set()
        await asyncio.gather(*first, late)
        return model.batches

    assert run(Limits(max_batch=2, max_delay_ms=HOUR_MS, max_running=1), scenario) == [[0, 1], [2]]


def test_a_request_whose_caller_gave_up_leaves_the_queue_and_never_runs() -> None:
    async def scenario(model: Model, batcher: Batcher) -> list[list[int]]:
        first = await held(model, batcher)
        gone = asyncio.create_task(batcher.submit((1,)))
        kept = asyncio.create_task(batcher.submit((2,)))
        await until(lambda: batcher.depth == 2)
        gone.cancel()
        await until(lambda: batcher.depth == 1)
        model.gate.set()
        await asyncio.gather(first, kept)
        return model.batches

    assert run(Limits(16, max_running=1), scenario) == [[0], [2]]


def test_closing_finishes_what_waits_and_refuses_what_comes_later() -> None:
    async def scenario(model: Model, batcher: Batcher) -> list[Any]:
        first = await held(model, batcher)
        waiting = [asyncio.create_task(batcher.submit((n,))) for n in (1, 2)]
        await until(lambda: batcher.depth == 2)
        closing = asyncio.create_task(batcher.close())
        await until(lambda: batcher._closing)
        with pytest.raises(BusyError, match="the server is stopping"):
            await batcher.submit((9,))
        model.gate.set()
        await closing
        return await asyncio.gather(first, *waiting)

    assert run(Limits(16, max_running=1), scenario) == [(0,), (2,), (4,)]


def test_batches_are_counted_by_size() -> None:
    async def scenario(model: Model, batcher: Batcher) -> Any:
        first = await held(model, batcher)
        rest = [asyncio.create_task(batcher.submit((n,))) for n in (1, 2, 3)]
        await until(lambda: batcher.depth == 3)
        model.gate.set()
        await asyncio.gather(first, *rest)
        return batcher.counts

    counts = run(Limits(16, max_running=1), scenario)
    assert (counts.batches, counts.requests) == (2, 4)
    assert counts.sizes == [1, 0, 1, 0, 0, 0, 0, 0]
