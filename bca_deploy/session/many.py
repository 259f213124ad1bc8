"""Many pairs of different lengths: padded into batches where a GPU likes that, side by side on single threads on a CPU."""

import contextvars
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from bca_deploy.errors import InputError
from bca_deploy.forks import ForkLock
from bca_deploy.session.backends.backend import Backend
from bca_deploy.session.contract import sizes_of
from bca_deploy.session.padding import cut, grouped, stacked

Array = NDArray[Any]
#: The checked inputs of one request by name.
Prepared = dict[str, Array]
#: Its outputs.
Outputs = dict[str, Array]
#: Runs and times one call: a method of the backend, and the inputs.
Timed = Callable[[Any, Mapping[str, Array]], Outputs]

#: Pairs with more rows than this keep all threads busy by themselves. Side by side against one after another, onnxruntime 1.32
#: on 2 cores, dims 512/386: 1.17x at 2 x 128 rows, 1.13x at 2 x 256, 1.01x at 2 x 512.
ALONE_ROWS = 768


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


class Many:
    """Runs many pairs on a backend.

    Args:
        backend: what runs.
        width: features of a row inside, for the cost.
        workers: threads for what runs side by side.
        timed: runs one call.
        executor: gives the threads.
        count_padding: told of rows added.
    """

    def __init__(
        self,
        backend: Backend,
        width: int,
        workers: int,
        timed: Timed,
        executor: Callable[[], ThreadPoolExecutor],
        count_padding: Callable[[int], None],
    ) -> None:
        self._backend, self._width, self._workers = backend, width, workers
        self._timed, self._executor, self._count_padding = timed, executor, count_padding
        self._lock, self._running = ForkLock(), 0

    def _sizes(self, ready: Sequence[Prepared]) -> list[Size]:
        return [Size(index, width=self._width, **sizes_of(one)) for index, one in enumerate(ready)]

    def side_by_side(self, ready: list[Prepared]) -> list[Outputs]:
        """Return the outputs of each pair: the large ones on all threads in turn, the others on one thread each.

        Calls that run at once share the threads.
        """
        with self._lock:
            self._running += 1
            workers = max(1, self._workers // self._running)
        try:
            return self._side_by_side(ready, workers)
        finally:
            with self._lock:
                self._running -= 1

    def _side_by_side(self, ready: list[Prepared], workers: int) -> list[Outputs]:
        together, alone = schedule(self._sizes(ready), workers)
        outputs: dict[int, Outputs] = {i: self._timed(self._backend.run, ready[i]) for i in together}
        waiting = deque(alone)

        def work() -> None:
            while True:
                try:
                    index = waiting.popleft()
                except IndexError:  # nothing is waiting any more
                    return
                outputs[index] = self._timed(self._backend.run_alone, ready[index])

        # The caller is one of the workers: for short requests, handing each of them over would cost as much as running it.
        helpers = [self._executor().submit(contextvars.copy_context().run, work) for _ in range(min(workers, len(alone)) - 1)]
        try:
            work()
        finally:
            waiting.clear()  # where one request fails, nobody begins another
            # A helper that got no thread by now has nothing left to do.
            errors = [error for helper in helpers if not helper.cancel() and (error := helper.exception())]
        if errors:
            raise errors[0]
        return [outputs[index] for index in range(len(ready))]

    def padded(self, ready: list[Prepared]) -> list[Outputs]:
        """Return the outputs of each pair, run in padded batches.

        Raises:
            InputError: the model cannot be padded.
        """
        self._check_padding(ready)
        outputs: list[Outputs] = [{} for _ in ready]
        sizes = self._sizes(ready)
        shapes = {size.index: (size.batch, size.x_len, size.context_len) for size in sizes}
        for group in grouped(shapes, self._backend.profiles or (self._backend.dims,)):
            members = [ready[index] for index in group]
            batch = stacked(members)
            (whole,) = self._sizes([batch])
            self._count_padding(whole.rows - sum(sizes[index].rows for index in group))
            for index, own in zip(group, cut(self._timed(self._backend.run, batch), members), strict=True):
                outputs[index] = own
        return outputs

    def _check_padding(self, ready: list[Prepared]) -> None:
        lengths = {(r["x"].shape[1], r["context"].shape[1]) for r in ready}
        names = {tensor.name for tensor in self._backend.inputs}
        if len(lengths) > 1 and not {"mask", "context_mask"} <= names:
            raise InputError(
                "pairs of different lengths cannot be padded without masks; export with both masks, or policy='alone'"
            )
        if "rel_pos_bias" in names or "attn" in {tensor.name for tensor in self._backend.outputs}:
            raise InputError("pairs with a position bias or attention maps cannot be padded; use policy='alone'")
