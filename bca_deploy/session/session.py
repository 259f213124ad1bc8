"""A bundle that runs, in one process, for months: checked inputs, any number of threads, nothing shared between calls."""

import asyncio
import contextvars
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from bca_deploy.bundle import selftest
from bca_deploy.bundle.manifest import SELFTEST_FILE, Manifest
from bca_deploy.bundle.read import Bundle
from bca_deploy.errors import BcaError, InputError, ParityError, check_one_of
from bca_deploy.session import arrays, many
from bca_deploy.session.backends.backend import Backend, Explanation
from bca_deploy.session.backends.cuda import DeviceArray
from bca_deploy.session.contract import Contract, Pair, how_to_have, numpy_dtype
from bca_deploy.session.many import Prepared
from bca_deploy.session.metrics import Call, Meter, Metrics, Observer
from bca_deploy.signature import Dims, Signature, Tensor
from bca_deploy.spec import left_out
from bca_deploy.threads import ForkLock, Home

Array = NDArray[Any]
AnyArray = Array | DeviceArray
Policy = Literal["auto", "alone", "pad"]

_log = logging.getLogger("bca_deploy.session.session")


class Session:
    """An open bundle on one backend; made by :func:`bca_deploy.open`.

    Call it from any number of threads. What comes in decides what goes out: numpy for numpy, torch for torch. It belongs to
    the process that opened it: in the child of a fork every call is an error that says so.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        explanation: Explanation,
        threads: int | None = None,
        on_call: Observer | None = None,
    ) -> None:
        self._bundle, self._backend, self._explanation, self._on_call = bundle, backend, explanation, on_call
        self._reader = arrays.Reader(backend.gpu)
        self._signature = backend.signature
        self._left_out = left_out(bundle.manifest.interface)
        self._contract = Contract(backend.signature, backend.profiles, self._left_out)
        self._workers = threads or len(os.sched_getaffinity(0))
        self._meter = Meter()
        width = max((layer.spec.inner_dim for layer in bundle.manifest.layers), default=1)
        self._many = many.Many(backend, width, self._workers, self._timed, self._executor, self._meter.pad)
        self._pool: ThreadPoolExecutor | None = None
        self._lock = ForkLock()
        self._closed = False
        self._home = Home("the session", self)

    def __call__(self, *args: Any, cast: bool = False, **named: Any) -> tuple[Any, ...]:
        """Run the model.

        Args:
            *args: the inputs in the order of :attr:`inputs`. For the layer ``x [B, N, dim]``, ``context [B, M, context_dim]``,
                then ``mask [B, N]``, ``context_mask [B, M]`` and ``rel_pos_bias`` where the model has them; masks that are
                left out are all true.
            cast: take other floating-point dtypes, other integers, and masks of 0 and 1.
            **named: the same by name.

        Returns:
            The outputs in order; for the layer ``out``, ``context_out``, and the attention maps where the model gives them.

        Raises:
            InputError: what is wrong with which input, and the way out.
            BcaError: the session is closed, or was opened before a fork.
        """
        self._check_open()
        return tuple(self._run(self._contract.bind(args, named), cast).values())

    def run(self, inputs: Mapping[str, Any], *, cast: bool = False) -> dict[str, Any]:
        """Return the outputs by name; arguments and errors as for calling the session."""
        self._check_open()
        return self._run(self._contract.bind((), inputs), cast)

    def run_into(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], *, cast: bool = False) -> None:
        """Run the model and write into the caller's arrays, which may be used again.

        Args:
            inputs: by name.
            outputs: an array for every output, C-contiguous, of its dtype and shape; on the CPU, or on the session's GPU. None
                may share memory with an input or with another.
            cast: as for calling the session.

        Raises:
            InputError: an input or output that does not fit.
        """
        self._check_open()
        ready = self._ready(self._contract.bind((), inputs), cast)
        targets = self._reader.read(outputs, "output")
        self._check_outputs(ready, targets)
        contiguous = {n: a if isinstance(a, DeviceArray) else np.ascontiguousarray(a) for n, a in ready.items()}
        arrays.check_overlaps(contiguous, targets)
        self._timed(lambda given: self._backend.run_into(given, targets), contiguous)

    def run_many(self, pairs: Iterable[Pair], *, policy: Policy = "auto", cast: bool = False) -> list[tuple[Any, ...]]:
        """Run many pairs of different lengths.

        On the CPU each pair runs on one thread, several at once; on a GPU pairs of similar lengths are padded into one
        batch, and the padding is cut off again. Live rows come out as one by one. A masked row of a padded pair is the mean
        over the padded values too: mask it in what follows, as always.

        Args:
            pairs: the inputs of each, as for calling the session: ``(x, context)`` or ``(x, context, mask, context_mask)``.
            policy: ``alone`` or ``pad`` instead of what suits the backend.
            cast: as for calling the session.

        Returns:
            The outputs of each pair, in order.

        Raises:
            InputError: naming the pair.
        """
        self._check_open()
        given = [tuple(pair) for pair in pairs]
        outputs = self.run_prepared([self._ready_pair(index, pair, cast) for index, pair in enumerate(given)], policy=policy)
        return [tuple(_back(one, pair).values()) for one, pair in zip(outputs, given, strict=True)]

    def prepare(self, inputs: Mapping[str, Any], *, cast: bool = False) -> Prepared:
        """Check one request now, to be run later by :meth:`run_prepared`, on any thread.

        Args:
            inputs: by name, on the CPU.
            cast: as for calling the session.

        Returns:
            Every input as the model takes it; it shares the memory of what needed no cast.

        Raises:
            InputError: what is wrong with which input, and the way out; arrays on the GPU, too.
        """
        self._check_open()
        return self._on_cpu(self._contract.bind((), inputs), cast)

    def run_prepared(self, ready: Sequence[Prepared], *, policy: Policy = "auto") -> list[dict[str, Array]]:
        """Run requests of different lengths that :meth:`prepare` has checked, as :meth:`run_many` does.

        Args:
            ready: from this session's :meth:`prepare`.
            policy: ``alone`` or ``pad`` instead of what suits the backend.

        Returns:
            The outputs of each by name, in order.

        Raises:
            InputError: the policy is not known, or pads what cannot be padded.
        """
        self._check_open()
        check_one_of("policy", policy, get_args(Policy))
        pads = self._backend.pads if policy == "auto" else policy == "pad"
        return self._many.padded(list(ready)) if pads else self._many.side_by_side(list(ready))

    async def run_async(self, *args: Any, cast: bool = False, **named: Any) -> tuple[Any, ...]:
        """Run the model without blocking the event loop; as for calling the session.

        A call that was accepted is finished, also when the session is closed meanwhile.
        """
        self._check_open()
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        bound = self._contract.bind(args, named)
        outputs = await loop.run_in_executor(self._executor(), lambda: context.run(self._run, bound, cast))
        return tuple(outputs.values())

    def warmup(self, shapes: Iterable[Sequence[int]] | None = None) -> None:
        """Run once for each shape, in every engine context, so that later calls find everything ready.

        Args:
            shapes: a size for each of :attr:`dims`, in order, such as ``(batch, x_len, context_len)``; None takes the optimal
                sizes.

        Raises:
            InputError: sizes that the model does not take.
        """
        self._check_open()
        best = [tuple(self.dims.at("opt").values())]
        for shape in best if shapes is None else shapes:
            self._timed(self._backend.warm, self._zeros(self.dims.named(shape)))

    def trim(self) -> None:
        """Give memory that large calls have left to the next one as large back: for a process that has had its peak."""
        self._check_open()
        self._backend.trim(self._zeros(self.dims.at("min")))

    def _zeros(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        # Views of one number: an impossible shape is refused before it takes memory.
        zeros = {
            tensor.name: np.broadcast_to(np.zeros((), numpy_dtype(tensor.dtype)), tensor.shape(sizes)) for tensor in self.inputs
        }
        return {name: np.ascontiguousarray(array) for name, array in self._ready(zeros, cast=False).items()}

    def selftest(self) -> None:
        """Run the bundle's own inputs and hold the outputs to their bounds.

        Raises:
            ParityError: an output is out of bounds.
            BundleError: selftest.npz is damaged.
        """
        arrays = selftest.read(self._bundle.path(SELFTEST_FILE))
        failures = selftest.failures(arrays, self._backend.precision, lambda inputs: self.run(inputs, cast=True))
        if failures:
            raise ParityError("; ".join(failures))

    def explain(self) -> Explanation:
        """Return what runs, and why the faster backends were passed over."""
        return self._explanation

    def metrics(self) -> Metrics:
        """Return what this session has done so far; in the child of a fork, what it had done before."""
        return self._meter.snapshot()

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    @property
    def signature(self) -> Signature:
        """What the model that runs takes and gives."""
        return self._signature

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What it takes, in order."""
        return self._signature.inputs

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """What it gives, in order."""
        return self._signature.outputs

    @property
    def dims(self) -> Dims:
        """The sizes that its named dimensions may take."""
        return self._signature.dims

    @property
    def profiles(self) -> tuple[Dims, ...]:
        """The combinations of sizes, where not every one within ``dims`` will do."""
        return self._backend.profiles

    def close(self) -> None:
        """Finish what ``run_async`` accepted, and free everything; calling the session is an error from now on.

        Calls that other threads are in end as they would have; the memory is freed when the last of them is done. In the
        child of a fork nothing is freed: it is the parent's to free.
        """
        with self._lock:
            self._closed, pool = True, self._pool
        if not self._home.here:
            return
        try:
            if pool is not None:
                pool.shutdown()
            self._backend.close()
        finally:
            self._bundle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self, given: Mapping[str, Any], cast: bool) -> dict[str, Any]:
        ready = self._ready(given, cast)
        if self._backend.gpu is not None and any(isinstance(array, DeviceArray) for array in ready.values()):
            return self._run_on_gpu(given, ready)
        return _back(self._timed(self._backend.run, ready), given.values())

    def _run_on_gpu(self, given: Mapping[str, Any], ready: Mapping[str, AnyArray]) -> dict[str, Any]:
        sizes = self._signature.sizes(ready)
        made = {
            tensor.name: self._reader.make(given.values(), tensor.shape(sizes), numpy_dtype(tensor.dtype))
            for tensor in self.outputs
        }
        targets = self._reader.read(made, "output")
        self._timed(lambda inputs: self._backend.run_into(inputs, targets), ready)
        return made

    def _ready(self, given: Mapping[str, Any], cast: bool) -> dict[str, AnyArray]:
        return self._contract.check(self._reader.read(given), cast)

    def _check_open(self) -> None:
        self._home.check()
        if self._closed:
            raise BcaError("the session is closed; open the bundle again")

    def _ready_pair(self, index: int, pair: tuple[Any, ...], cast: bool) -> Prepared:
        try:
            return self._on_cpu(self._contract.bind(pair, {}), cast)
        except InputError as error:
            raise InputError(f"pair {index}: {error}") from None

    def _on_cpu(self, given: Mapping[str, Any], cast: bool) -> Prepared:
        ready = self._ready(given, cast)
        if any(isinstance(array, DeviceArray) for array in ready.values()):
            raise InputError("requests that run together have their arrays on the CPU; call the session for those on the GPU")
        return ready  # type: ignore[return-value]  # those of the GPU are refused above

    def _timed(self, run: Any, ready: Mapping[str, Any]) -> Any:
        start, failed = time.perf_counter(), True
        try:
            result = run(ready)
            failed = False
        finally:
            seconds = time.perf_counter() - start
            self._meter.add(seconds, *self._signature.counts(ready), failed)
            if self._on_call is not None:
                self._observe(seconds, self._signature.sizes(ready), failed)
        return result

    def _observe(self, seconds: float, sizes: dict[str, int], failed: bool) -> None:
        end_ns = time.time_ns()
        call = Call(end_ns - round(seconds * 1e9), end_ns, self._backend.name, sizes, failed)
        try:
            if self._on_call is not None:
                self._on_call(call)
        except Exception:  # an observer's mistake must not fail a request
            _log.exception("on_call failed")

    def _check_outputs(self, ready: Mapping[str, AnyArray], outputs: Mapping[str, AnyArray]) -> None:
        names, sizes = [tensor.name for tensor in self.outputs], self._signature.sizes(ready)
        if set(outputs) != set(names):
            how = next((how_to_have(name, self._left_out) for name in outputs if name in self._left_out), "")
            raise InputError(f"outputs {', '.join(outputs)} were given, and the model has {', '.join(names)}{how}")
        for tensor in self.outputs:
            wanted, array = tensor.shape(sizes), outputs[tensor.name]
            if array.shape != wanted or array.dtype != tensor.dtype or not _takes_writes(array):
                raise InputError(
                    f"output {tensor.name} is {list(array.shape)} {array.dtype}; a writable, C-contiguous array of "
                    f"{list(wanted)} {tensor.dtype} is needed"
                )

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            self._check_open()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="bca-session")
            return self._pool


def _back(outputs: dict[str, Array], like: Iterable[Any]) -> dict[str, Any]:
    back = arrays.back(like)
    return outputs if back is None else {name: back(array) for name, array in outputs.items()}


def _takes_writes(array: AnyArray) -> bool:
    return isinstance(array, DeviceArray) or (array.flags.c_contiguous and array.flags.writeable)
