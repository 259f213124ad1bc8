"""Open a bundle and run it, in one process, for months: checked inputs, any number of threads, nothing shared between calls."""

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from bca_deploy import many, selftest, tensors
from bca_deploy.backends import Backend, Explanation, Options, choose
from bca_deploy.bundle import Bundle, Check
from bca_deploy.contract import Contract
from bca_deploy.errors import BcaError, InputError, ParityError
from bca_deploy.manifest import SELFTEST_FILE, Manifest, TensorEntry
from bca_deploy.metrics import Meter, Metrics
from bca_deploy.spec import Dims, Precision

Array = NDArray[Any]
#: One request of ``run_many``: ``(x, context)``, or with masks ``(x, context, mask, context_mask)``.
Pair = Sequence[Any]
Policy = Literal["auto", "alone", "pad"]

_log = logging.getLogger("bca_deploy.session")


def open_session(
    path: str | Path,
    backend: str = "auto",
    *,
    precision: Precision | None = None,
    threads: int | None = None,
    verify: Check = "full",
) -> "Session":
    """Open a bundle to run it. Needs neither torch nor onnx.

    Args:
        path: the bundle's directory or archive.
        backend: ``auto`` takes the fastest that works here; a name takes that one or fails.
        precision: of the model; None takes the best that the backend has.
        threads: for onnxruntime on CPU; None takes every core.
        verify: how much of the bundle is checked first: every hash, only sizes, or nothing.

    Returns:
        The session; a context manager.

    Raises:
        BundleError: damaged, unsafe or of a newer format.
        InputError: the backend is not known, or the precision not in the bundle.
        EngineError: the backend asked for does not work here.
        MissingDependencyError: onnxruntime is not installed.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; it must be at least 1, or None for every core")
    bundle = Bundle.open(path, verify)
    try:
        chosen, explanation = choose(bundle, backend, Options(precision, threads))
    except BaseException:
        bundle.close()
        raise
    _log.info("%s: %s", path, explanation)
    return Session(bundle, chosen, explanation, threads)


class Session:
    """An open bundle on one backend; made by :func:`bca_deploy.open`.

    Call it from any number of threads. What comes in decides what goes out: numpy for numpy, torch for torch.
    """

    def __init__(self, bundle: Bundle, backend: Backend, explanation: Explanation, threads: int | None = None) -> None:
        self._bundle, self._backend, self._explanation = bundle, backend, explanation
        advice = "cut the sequence into pieces, or export again with wider dims"
        self._contract = Contract(backend.inputs, backend.dims, advice)
        self._names = tuple(tensor.name for tensor in backend.outputs)
        self._workers = threads or len(os.sched_getaffinity(0))
        self._meter = Meter()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._closed = False

    def __call__(self, *args: Any, cast: bool = False, **named: Any) -> tuple[Any, ...]:
        """Run the model.

        Args:
            *args: ``x [B, N, dim]``, ``context [B, M, context_dim]``, then ``mask [B, N]``, ``context_mask [B, M]`` and
                ``rel_pos_bias`` where the model has them. Masks that are left out are all true.
            cast: take other floating-point dtypes, and masks of 0 and 1.
            **named: the same by name.

        Returns:
            ``out``, ``context_out``, and the attention maps where the model gives them.

        Raises:
            InputError: what is wrong with which input, and the way out.
            BcaError: the session is closed.
        """
        return tuple(self._run(self._contract.bind(args, named), cast).values())

    def run(self, inputs: Mapping[str, Any], *, cast: bool = False) -> dict[str, Any]:
        """Return the outputs by name; arguments and errors as for calling the session."""
        return self._run(self._contract.bind((), inputs), cast)

    def run_into(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], *, cast: bool = False) -> None:
        """Run the model and write into the caller's arrays, which may be used again.

        Args:
            inputs: by name.
            outputs: an array for every output, C-contiguous, of its dtype and shape.
            cast: as for calling the session.

        Raises:
            InputError: an input or output that does not fit.
        """
        ready = self._ready(self._contract.bind((), inputs), cast)
        targets = {name: tensors.as_array(name, array) for name, array in outputs.items()}
        self._check_outputs(ready, targets)
        contiguous = {name: np.ascontiguousarray(array) for name, array in ready.items()}
        self._timed(lambda given: self._backend.run_into(given, targets), contiguous)

    def run_many(self, pairs: Iterable[Pair], *, policy: Policy = "auto", cast: bool = False) -> list[tuple[Any, ...]]:
        """Run many pairs of different lengths.

        On the CPU each pair runs on one thread, several at once; on a GPU pairs of similar lengths are padded into one
        batch, and the padding is cut off again. Live rows come out as one by one. A masked row of a padded pair is the mean
        over the padded values too: mask it in what follows, as always.

        Args:
            pairs: ``(x, context)`` or ``(x, context, mask, context_mask)``, each as for calling the session.
            policy: ``alone`` or ``pad`` instead of what suits the backend.
            cast: as for calling the session.

        Returns:
            The outputs of each pair, in order.

        Raises:
            InputError: naming the pair.
        """
        given = list(pairs)
        ready = [self._ready_pair(index, pair, cast) for index, pair in enumerate(given)]
        pads = self._backend.pads if policy == "auto" else policy == "pad"
        outputs = self._padded(ready) if pads else self._side_by_side(ready)
        return [
            tuple(back(outputs[index][name]) for name in self._names)
            for index, back in enumerate(tensors.back(pair) for pair in given)
        ]

    async def run_async(self, *args: Any, cast: bool = False, **named: Any) -> tuple[Any, ...]:
        """Run the model without blocking the event loop; as for calling the session."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor(), lambda: self(*args, cast=cast, **named))

    def warmup(self, shapes: Iterable[tuple[int, int, int]] | None = None) -> None:
        """Run once for each ``(batch, x_len, context_len)``, so that later calls find memory and kernels ready.

        Args:
            shapes: None takes the bundle's optimal sizes.
        """
        dims = self._backend.dims
        for batch, x_len, context_len in shapes or [(dims.batch.opt, dims.x_len.opt, dims.context_len.opt)]:
            sizes = {"batch": batch, "x_len": x_len, "context_len": context_len}
            zeros = {
                t.name: np.zeros([sizes[a] if isinstance(a, str) else a for a in t.axes], t.dtype) for t in self._backend.inputs
            }
            self.run(zeros)

    def selftest(self) -> None:
        """Run the bundle's own inputs and hold the outputs to their bounds.

        Raises:
            ParityError: an output is out of bounds.
        """
        with np.load(self._bundle.path(SELFTEST_FILE), allow_pickle=False) as arrays:
            failures = selftest.failures(arrays, self._backend.precision, lambda inputs: self.run(inputs, cast=True))
        if failures:
            raise ParityError("; ".join(failures))

    def explain(self) -> Explanation:
        """Return what runs, and why the faster backends were passed over."""
        return self._explanation

    def metrics(self) -> Metrics:
        """Return what this session has done so far."""
        return self._meter.snapshot()

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    @property
    def inputs(self) -> tuple[TensorEntry, ...]:
        """What the model that runs takes, in order."""
        return self._backend.inputs

    @property
    def outputs(self) -> tuple[TensorEntry, ...]:
        """What it gives, in order."""
        return self._backend.outputs

    @property
    def dims(self) -> Dims:
        """The sizes that its named dimensions may take."""
        return self._backend.dims

    def close(self) -> None:
        """Wait for calls in the background, free everything; calling the session is an error from now on."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown()
        self._backend.close()
        self._bundle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self, given: Mapping[str, Any], cast: bool) -> dict[str, Any]:
        outputs, back = self._timed(self._backend.run, self._ready(given, cast)), tensors.back(given.values())
        return {name: back(outputs[name]) for name in self._names}

    def _ready(self, given: Mapping[str, Any], cast: bool) -> dict[str, Array]:
        if self._closed:
            raise BcaError("the session is closed; open the bundle again")
        arrays = {name: tensors.as_array(name, value) for name, value in given.items()}
        return self._contract.check(arrays, cast)

    def _ready_pair(self, index: int, pair: Pair, cast: bool) -> dict[str, Array]:
        try:
            return self._ready(self._contract.bind(tuple(pair), {}), cast)
        except InputError as error:
            raise InputError(f"pair {index}: {error}") from None

    def _timed(self, run: Any, ready: Mapping[str, Array]) -> Any:
        start, failed = time.perf_counter(), True
        try:
            result = run(ready)
            failed = False
        finally:
            batch, rows = ready["x"].shape[0], ready["x"].shape[1] + ready["context"].shape[1]
            self._meter.add(time.perf_counter() - start, batch, batch * rows, failed)
        return result

    def _check_outputs(self, ready: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        sizes = {"batch": ready["x"].shape[0], "x_len": ready["x"].shape[1], "context_len": ready["context"].shape[1]}
        if set(outputs) != set(self._names):
            raise InputError(f"outputs {', '.join(outputs)} were given, and the model has {', '.join(self._names)}")
        for tensor in self._backend.outputs:
            wanted = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.axes)
            array = outputs[tensor.name]
            if (
                array.shape != wanted
                or array.dtype != tensor.dtype
                or not array.flags.c_contiguous
                or not array.flags.writeable
            ):
                raise InputError(
                    f"output {tensor.name} is {list(array.shape)} {array.dtype}; a writable, C-contiguous array of "
                    f"{list(wanted)} {tensor.dtype} is needed"
                )

    def _sizes(self, ready: Sequence[Mapping[str, Array]]) -> list[many.Size]:
        width = self._bundle.manifest.layer.inner_dim
        return [many.Size(i, r["x"].shape[0], r["x"].shape[1], r["context"].shape[1], width) for i, r in enumerate(ready)]

    def _side_by_side(self, ready: list[dict[str, Array]]) -> list[dict[str, Array]]:
        together, alone = many.schedule(self._sizes(ready), self._workers)
        outputs: dict[int, dict[str, Array]] = {i: self._timed(self._backend.run, ready[i]) for i in together}
        waiting = deque(alone)

        def work() -> None:
            while True:
                try:
                    index = waiting.popleft()
                except IndexError:  # nothing is waiting any more
                    return
                outputs[index] = self._timed(self._backend.run_alone, ready[index])

        # The caller is one of the workers: for short requests, handing each of them over would cost as much as running it.
        helpers = [self._executor().submit(work) for _ in range(min(self._workers, len(alone)) - 1)]
        try:
            work()
        finally:
            waiting.clear()  # where one request fails, nobody begins another
            errors = [error for helper in helpers if (error := helper.exception())]
        if errors:
            raise errors[0]
        return [outputs[index] for index in range(len(ready))]

    def _padded(self, ready: list[dict[str, Array]]) -> list[dict[str, Array]]:
        self._check_padding(ready)
        outputs: list[dict[str, Array]] = [{} for _ in ready]
        for group in many.buckets(self._sizes(ready), self._backend.dims.batch.max):
            batch = self._stack([ready[index] for index in group])
            stacked = self._timed(self._backend.run, batch)
            start = 0
            for index in group:
                outputs[index] = _cut(stacked, start, ready[index])
                start += ready[index]["x"].shape[0]
        return outputs

    def _check_padding(self, ready: list[dict[str, Array]]) -> None:
        lengths = {(r["x"].shape[1], r["context"].shape[1]) for r in ready}
        names = set(self._contract.names)
        if len(lengths) > 1 and not {"mask", "context_mask"} <= names:
            raise InputError(
                "pairs of different lengths cannot be padded without masks; export with both masks, or policy='alone'"
            )
        if "rel_pos_bias" in names or "attn" in self._names:
            raise InputError("pairs with a position bias or attention maps cannot be padded; use policy='alone'")

    def _stack(self, group: list[dict[str, Array]]) -> dict[str, Array]:
        rows = {"x": max(r["x"].shape[1] for r in group), "context": max(r["context"].shape[1] for r in group)}
        lengths = rows | {"mask": rows["x"], "context_mask": rows["context"]}
        added = sum(r[n].shape[0] * (rows[n] - r[n].shape[1]) for r in group for n in rows)
        self._meter.pad(added)
        return {name: np.concatenate([_pad(r[name], lengths[name]) for r in group]) for name in group[0]}

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._closed:
                raise BcaError("the session is closed; open the bundle again")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="bca-session")
            return self._pool


def _pad(array: Array, length: int) -> Array:
    missing = length - array.shape[1]
    return np.pad(array, [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)]) if missing else array


def _cut(stacked: Mapping[str, Array], start: int, ready: Mapping[str, Array]) -> dict[str, Array]:
    """Return one pair's outputs from a padded batch; copies, so that one kept result does not keep the batch."""
    rows = slice(start, start + ready["x"].shape[0])
    lengths = {"out": ready["x"].shape[1], "context_out": ready["context"].shape[1]}
    return {name: stacked[name][rows, :length].copy() for name, length in lengths.items()}
