"""One call at a time on an engine: a stream, buffers that grow and are reused, an execution context, and CUDA graphs.

Requires: checked inputs, and the GPU made the calling thread's. Ensures: outputs that the engine computed in this very call,
or an error and no outputs.

A captured graph holds the addresses and the state of its context, so each has a context of its own, used for nothing else;
all contexts of a lane share one scratch memory, since one at a time works. Growing a buffer drops the graphs.
"""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.engines.profiles import choose_profile
from bca_deploy.errors import EngineError
from bca_deploy.session.backends.backend import Arrays
from bca_deploy.session.backends.cuda import DeviceArray, Gpu, Launch, failing_as
from bca_deploy.session.backends.loaded_engine import LoadedEngine, Shape, shape_of

Array = NDArray[Any]

_log = logging.getLogger("bca_deploy.engines.compile")


@dataclass(frozen=True)
class _Graph:
    """A captured call.

    Attributes:
        context: what it was captured from, kept as it was then.
        launch: replays it; None where it cannot be captured, or a replay did not give what the call itself gave.
        shapes: of the outputs.
    """

    context: Any
    launch: Launch | None
    shapes: dict[str, Shape]


class Lane:
    """Runs an engine, one call at a time.

    Args:
        engine: what to run.
        gpu: where.
        graphs: how many shapes to keep a CUDA graph of; the least recently used goes first. 0 captures nothing.
        poison: fill every output with NaN before the call, so that what the engine does not write shows.
    """

    def __init__(self, engine: LoadedEngine, gpu: Gpu, graphs: int = 0, poison: bool = False) -> None:
        self._engine, self._gpu, self._limit, self._poison = engine, gpu, graphs, poison
        self._stream = gpu.stream()
        self._buffers: dict[str, Any] = {}
        self._graphs: OrderedDict[tuple[Shape, ...], _Graph] = OrderedDict()
        self._context: Any = None

    def run(self, inputs: Arrays, outputs: Arrays | None = None) -> dict[str, Array]:
        """Run once.

        Args:
            inputs: by name, in the engine's element types; on the CPU, or on the GPU with its writers already waited for.
            outputs: where to put them, as for ``inputs``; None makes arrays on the CPU.

        Returns:
            The outputs that are on the CPU.

        Raises:
            InputError: no profile holds the shapes.
            EngineError: the engine or CUDA failed; nothing of the outputs is meant.
        """
        self._engine.said.lines.clear()
        self._gpu.enter()
        # Held here until the work is done: copies may still read from them after they are enqueued.
        ready = {n: a if isinstance(a, DeviceArray) else np.ascontiguousarray(a) for n, a in inputs.items()}
        shapes = {name: tuple(ready[name].shape) for name in self._engine.inputs}
        profile = choose_profile(self._engine.profiles, shapes)
        try:
            with failing_as("the call"):
                return self._run(profile, shapes, ready, outputs or {})
        except BaseException:
            self._forget()
            raise

    def prepare(self) -> None:
        """Make the context and its memory, to know that they are to be had."""
        self._context = self._engine.context()
        if self._engine.scratch_bytes:
            self._buffer("scratch", self._engine.scratch_bytes)

    def _run(self, profile: int, shapes: Mapping[str, Shape], inputs: Arrays, outputs: Arrays) -> dict[str, Array]:
        addresses = {name: self._in(name, inputs[name]) for name in self._engine.inputs}
        # A graph finds everything where it was, so it is no use for arrays that are wherever their owner has them.
        on_gpu = any(isinstance(array, DeviceArray) for array in (*inputs.values(), *outputs.values()))
        if self._limit and not on_gpu:
            return self._replayed(profile, shapes, addresses, outputs)
        if self._context is None:
            self._context = self._engine.context()
        made = self._enqueue(self._context, profile, shapes, addresses, outputs)
        return self._out(made, outputs)

    def _in(self, name: str, array: Array | DeviceArray) -> int:
        """Return where the engine finds an input."""
        if isinstance(array, DeviceArray):
            return array.address
        memory = self._buffer(name, array.nbytes)
        self._gpu.upload(memory, array, self._stream)
        return int(memory.handle)

    def _enqueue(
        self, context: Any, profile: int, shapes: Mapping[str, Shape], addresses: Mapping[str, int], outputs: Arrays
    ) -> dict[str, Shape]:
        """Enqueue the engine's work and return the shapes of the outputs."""
        self._set_shapes(context, profile, shapes)
        made = {name: shape_of(context.get_tensor_shape(name)) for name in self._engine.outputs}
        places = {name: self._place(name, shape, outputs.get(name)) for name, shape in made.items()}
        if self._engine.scratch_bytes:
            scratch = self._buffer("scratch", self._engine.scratch_bytes)
            context.set_device_memory(int(scratch.handle), self._engine.scratch_bytes)
        for name, address in (*addresses.items(), *places.items()):
            self._need(context.set_tensor_address(name, address), f"the address of {name}")
        self._need(context.execute_async_v3(int(self._stream.handle)), "the call")
        return made

    def _set_shapes(self, context: Any, profile: int, shapes: Mapping[str, Shape]) -> None:
        if context.active_optimization_profile != profile:
            accepted = context.set_optimization_profile_async(profile, int(self._stream.handle))
            self._need(accepted, f"profile {profile}")
        for name, shape in shapes.items():
            self._need(context.set_input_shape(name, shape), f"shape {list(shape)} of {name}")
        vague = context.infer_shapes()
        self._need(not vague, f"the shapes: they leave {', '.join(vague)} open")

    def _place(self, name: str, shape: Shape, given: Array | DeviceArray | None) -> int:
        if isinstance(given, DeviceArray):
            return given.address
        memory = self._buffer(name, int(np.prod(shape)) * self._engine.dtypes[name].itemsize)
        if self._poison:
            self._gpu.poison(memory, self._stream)
        return int(memory.handle)

    def _out(self, shapes: Mapping[str, Shape], outputs: Arrays) -> dict[str, Array]:
        """Fetch the outputs and wait; only then is the call known to have worked."""
        found: dict[str, Array] = {}
        for name, shape in shapes.items():
            target = outputs.get(name)
            if not isinstance(target, DeviceArray):
                found[name] = np.empty(shape, self._engine.dtypes[name]) if target is None else target
                self._gpu.download(found[name], self._buffers[name], self._stream)
        self._stream.sync()
        return found

    def _replayed(
        self, profile: int, shapes: Mapping[str, Shape], addresses: Mapping[str, int], outputs: Arrays
    ) -> dict[str, Array]:
        key = tuple(shapes.values())
        graph = self._graphs.get(key)
        if graph is None:
            return self._captured(key, profile, shapes, addresses, outputs)
        self._graphs.move_to_end(key)
        if graph.launch is None:
            self._enqueue(graph.context, profile, shapes, addresses, outputs)
        else:
            graph.launch()
        return self._out(graph.shapes, outputs)

    def _captured(
        self, key: tuple[Shape, ...], profile: int, shapes: Mapping[str, Shape], addresses: Mapping[str, int], outputs: Arrays
    ) -> dict[str, Array]:
        """Run for the first time, which also settles the context's state; capture; hold a replay against that first run."""
        context = self._engine.context()
        made = self._enqueue(context, profile, shapes, addresses, {})
        first = self._out(made, outputs)
        try:
            launch = self._capture(context)
            launch()
            again = self._out(made, {})
            if any(not np.array_equal(first[name], again[name], equal_nan=True) for name in made):
                raise EngineError("it does not repeat its call")
            self._graphs[key] = _Graph(context, launch, made)
        except Exception as error:  # the call itself is done and right
            _log.warning("no CUDA graph of %s: %s; these shapes run without one", dict(shapes), error)
            self._graphs[key] = _Graph(context, None, made)
        if len(self._graphs) > self._limit:
            self._graphs.popitem(last=False)
        return first

    def _capture(self, context: Any) -> Launch:
        handle = int(self._stream.handle)
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(handle):  # TensorRT-RTX tells
            raise EngineError("the library cannot capture it")
        return self._gpu.capture(self._stream, lambda: self._need(context.execute_async_v3(handle), "the capture"))

    def _buffer(self, name: str, size: int) -> Any:
        memory = self._buffers.get(name)
        if memory is None or memory.size < size:
            self._graphs.clear()  # they hold the old address
            size = max(size, 2 * memory.size if memory else 0)  # lengths that creep up do not allocate at each step
            self._buffers.pop(name, None)  # before the larger one is made
            memory = self._buffers[name] = self._gpu.allocate(size, self._stream)
        return memory

    def _forget(self) -> None:
        """Drop what is in an unknown state, when nothing of the failed call is under way any more."""
        with contextlib.suppress(Exception):
            self._stream.sync()
        self._context = None
        self._graphs.clear()
        self._buffers.clear()

    def _need(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise EngineError(f"the engine refused {what}: {self._engine.said.reason()}")
