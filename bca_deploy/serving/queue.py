"""The bounded queue in front of ``session.run_prepared``: requests that wait together run together."""

import asyncio
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from bca_deploy.serving.flight import BusyError
from bca_deploy.session.many import Prepared
from bca_deploy.session.metrics import cumulative

#: Upper bounds of the histogram of batch sizes.
BOUNDS = (1, 2, 4, 8, 16, 32, 64)

#: From checked requests to the outputs of each.
Run = Callable[[Sequence[Prepared]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Limits:
    """How requests are put together.

    Attributes:
        max_batch: requests in one call of ``run_prepared``; None leaves it to the server, and counts as 1 here.
        max_delay_ms: how long the first of them waits for more. At 0 a call takes what has come in during the one before,
            which is all a CPU needs; a GPU gains from a little patience.
        max_queue: requests that may wait; more are refused.
        max_running: calls of ``run_prepared`` at once: one computes while the answers of another are written.
    """

    max_batch: int | None = None
    max_delay_ms: float = 0.0
    max_queue: int = 64
    max_running: int = 2


@dataclass
class Counts:
    """What the queue has done, for the metrics."""

    refused: int = 0
    requests: int = 0
    batches: int = 0
    sizes: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def add(self, size: int) -> None:
        """Count one batch."""
        self.requests += size
        self.batches += 1
        self.sizes[bisect_left(BOUNDS, size)] += 1


@dataclass(eq=False)
class _Entry:
    ready: Prepared
    result: asyncio.Future[dict[str, Any]]
    arrived: float  # by the event loop's clock


class Batcher:
    """Takes requests on the event loop, runs them on a few threads of its own.

    Args:
        run: the session's ``run_prepared``; it spreads a batch over the cores, and shares them with the other batches.
        limits: how requests are put together.
    """

    def __init__(self, run: Run, limits: Limits) -> None:
        self._run_together, self._limits, self._max_batch = run, limits, limits.max_batch or 1
        self._waiting: deque[_Entry] = deque()
        self._arrived = asyncio.Event()
        self._room = asyncio.Semaphore(limits.max_running)
        self._threads = ThreadPoolExecutor(limits.max_running, thread_name_prefix="bca-batch")
        self._closing = False
        self.counts = Counts()
        #: Ends when the queue is closed; any other end is a defect, and the server must not go on.
        self.worker = asyncio.get_running_loop().create_task(self._work())

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    async def submit(self, ready: Prepared) -> dict[str, Any]:
        """Return the outputs of one request. Cancelling the caller takes a waiting request out of the queue.

        Raises:
            BusyError: the queue is full.
        """
        if self._closing or len(self._waiting) >= self._limits.max_queue:
            self.counts.refused += 1
            reason = "the server is stopping" if self._closing else f"{len(self._waiting)} requests are waiting"
            raise BusyError(f"{reason}, and the queue takes {self._limits.max_queue}; try again later, or on another replica")
        loop = asyncio.get_running_loop()
        entry = _Entry(ready, loop.create_future(), loop.time())
        self._waiting.append(entry)
        self._arrived.set()
        try:
            return await entry.result
        finally:
            if entry.result.cancelled() and entry in self._waiting:
                self._waiting.remove(entry)

    async def close(self) -> None:
        """Finish what waits, then stop."""
        self._closing = True
        self._arrived.set()
        await self.worker
        self._threads.shutdown()

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as running:
            while await self._requests():
                await self._room.acquire()
                await self._patience()
                running.create_task(self._run(self._take())).add_done_callback(lambda _: self._room.release())

    async def _requests(self) -> bool:
        """Wait for a request; False where no more will come."""
        while not self._waiting and not self._closing:
            self._arrived.clear()
            await self._arrived.wait()
        return bool(self._waiting)

    async def _patience(self) -> None:
        """Wait for more requests, as long as the first may wait."""
        if not (self._limits.max_delay_ms and self._waiting):
            return
        until = self._waiting[0].arrived + self._limits.max_delay_ms / 1e3
        while len(self._waiting) < self._max_batch and not self._closing:
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self._arrived.wait()
            except TimeoutError:
                break
        self._arrived.set()

    def _take(self) -> list[_Entry]:
        batch: list[_Entry] = []
        while self._waiting and len(batch) < self._max_batch:
            entry = self._waiting.popleft()
            if not entry.result.done():  # else its caller has given up
                batch.append(entry)
        return batch

    async def _run(self, batch: list[_Entry]) -> None:
        """Run a batch; where it fails, request by request, so that one bad request does not fail its neighbours."""
        if not batch:
            return
        self.counts.add(len(batch))
        error = await self._try(batch)
        if error is None:
            return
        for entry in batch:
            if not entry.result.done():  # else its caller has given up
                failed = await self._try([entry]) if len(batch) > 1 else error
                if failed is not None and not entry.result.done():
                    entry.result.set_exception(failed)

    async def _try(self, batch: list[_Entry]) -> Exception | None:
        """Run a batch, and return what went wrong with it."""
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._threads, self._run_together, [entry.ready for entry in batch])
            done = list(zip(batch, results, strict=True))
        except Exception as error:  # for whoever asked
            return error
        for entry, result in done:
            if not entry.result.done():
                entry.result.set_result(result)
        return None


def queue_collector(batcher: Any, guard: Any) -> Any:
    """Return a collector of a server's queue, of what is under way and of its answers.

    Args:
        batcher: the :class:`bca_deploy.serving.queue.Batcher`.
        guard: the :class:`bca_deploy.serving.guards.Guard`.
    """
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    class Collector:
        def collect(self) -> Any:
            yield GaugeMetricFamily("bca_queue_depth", "requests that wait", batcher.depth)
            yield CounterMetricFamily(
                "bca_queue_refused", "requests refused because the queue was full", batcher.counts.refused
            )
            buckets = cumulative(BOUNDS, batcher.counts.sizes)
            yield HistogramMetricFamily("bca_batch_size", "requests that ran together", buckets, batcher.counts.requests)
            yield GaugeMetricFamily("bca_in_flight_requests", "requests under way", guard.flight.requests)
            yield GaugeMetricFamily("bca_in_flight_bytes", "bytes of these and of their answers", guard.flight.bytes)
            answers = CounterMetricFamily("bca_answers", "requests by kind and status", labels=["kind", "status"])
            for labels, count in sorted(guard.requests.items()):
                answers.add_metric(labels, count)
            yield answers

    return Collector()
