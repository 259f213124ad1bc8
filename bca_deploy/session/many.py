"""Many pairs of different lengths: padded into batches where a GPU likes that, side by side on single threads on a CPU."""

import contextvars
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from bca_deploy.errors import InputError
from bca_deploy.session.backends.backend import Backend
from bca_deploy.session.padding import Sizes, cut, grouped, stacked, together
from bca_deploy.threads import ForkLock

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
class Load:
    """What one request costs.

    Attributes:
        index: its place among the requests.
        entries: in its batch.
        lengths: of its sequences.
        width: features of a row, for the cost.
    """

    index: int
    entries: int
    lengths: tuple[int, ...]
    width: int

    @property
    def rows(self) -> int:
        """Rows of all its sequences."""
        return self.entries * sum(self.lengths)

    @property
    def cost(self) -> float:
        """Multiplications, up to a factor: projections go with the rows, attention with the products of two lengths."""
        products = sum(one * other for one, other in itertools.combinations(self.lengths, 2))
        return self.entries * (sum(self.lengths) * 2.0 * self.width + 2.0 * products)


def schedule(loads: Sequence[Load], workers: int) -> tuple[list[int], list[int]]:
    """Say which requests to run one after another on all threads, and which side by side on one thread each.

    Side by side is the more efficient for small requests, as long as the workers end together. So the largest are taken out,
    to be run on all threads, until the rest can be dealt out evenly (within a tenth; longest first, Graham's rule).

    Args:
        loads: of the requests.
        workers: threads.

    Returns:
        Indices for all threads together, and indices for one thread each, longest first.
    """
    rest = sorted(loads, key=lambda load: -load.cost)
    in_turn: list[int] = []
    while rest and (rest[0].rows > ALONE_ROWS or not _even([load.cost for load in rest], workers)):
        in_turn.append(rest.pop(0).index)
    return in_turn, [load.index for load in rest]


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
        self._backend, self._width, self._workers, self._signature = backend, width, workers, backend.signature
        self._timed, self._executor, self._count_padding = timed, executor, count_padding
        self._lock, self._running = ForkLock(), 0

    def _load(self, index: int, sizes: Sizes) -> Load:
        lengths = tuple(sizes[name] for name in self._signature.lengths)
        return Load(index, self._signature.entries(sizes), lengths, self._width)

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
        loads = [self._load(index, self._signature.sizes(one)) for index, one in enumerate(ready)]
        in_turn, alone = schedule(loads, workers)
        outputs: dict[int, Outputs] = {i: self._timed(self._backend.run, ready[i]) for i in in_turn}
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
        sizes = {index: self._signature.sizes(one) for index, one in enumerate(ready)}
        self._check_padding(list(sizes.values()))
        outputs: list[Outputs] = [{} for _ in ready]
        for group in grouped(sizes, self._signature, self._backend.profiles or (self._signature.dims,)):
            own = [sizes[index] for index in group]
            run = together(own, self._signature)
            self._count_padding(self._signature.rows(run) - sum(map(self._signature.rows, own)))
            whole = self._timed(self._backend.run, stacked([ready[index] for index in group], self._signature))
            for index, part in zip(group, cut(whole, own, self._signature), strict=True):
                outputs[index] = part
        return outputs

    def _check_padding(self, sizes: list[Sizes]) -> None:
        signature = self._signature
        mixed = any(len({one[name] for one in sizes}) > 1 for name in signature.lengths)
        if (other := signature.not_stackable) is not None:
            raise InputError(
                f"requests cannot be padded into a batch: {other.name} {list(other.axes)} does not begin with the batch, or "
                "has two lengths; use policy='alone'"
            )
        if mixed and not signature.pads:
            raise InputError(
                "pairs of different lengths cannot be padded without masks; export with both masks, or policy='alone'"
            )
