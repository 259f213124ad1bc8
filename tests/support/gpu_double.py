"""A GPU and an engine without a GPU, strict where the real ones are merely undefined.

Work is done when its stream is waited for and not before, so that a buffer that is changed, freed or read too early shows.
Addresses that belong to no live memory, a context used by two threads at once, shapes outside the active profile, scratch
memory that is missing, and a graph whose context has changed since are errors. What an engine takes and gives comes from the
network that NVIDIA's parser read; what it computes comes from onnxruntime.
"""

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from bca_deploy.bundle.manifest import EngineEntry, GpuEntry, signature_of_engine
from bca_deploy.bundle.read import read_manifest
from bca_deploy.engines import libraries
from bca_deploy.engines.gpus import Gpus
from bca_deploy.engines.profiles import Ranges, shapes
from bca_deploy.errors import InputError
from bca_deploy.session.backends import engine, engine_runner, loaded_engine
from bca_deploy.session.backends import ort as ort_backend
from bca_deploy.session.backends.cuda import DeviceArray, Launch
from bca_deploy.session.contract import numpy_dtype
from bca_deploy.signature import Signature

Shape = tuple[int, ...]
Work = Callable[[], None]


class Memory:
    """Bytes at an address."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, 0xAB, np.uint8)  # never what anybody hopes for
        self.handle, self.size = self.bytes.ctypes.data, size


class Stream:
    """Work that waits."""

    handles = itertools.count(1)

    def __init__(self) -> None:
        self.handle, self.queue, self.capturing, self.broken = next(self.handles), list[Work](), False, ""

    def sync(self) -> None:
        work, self.queue = self.queue, []
        if self.broken:
            raise RuntimeError(self.broken)
        for one in work:
            one()


class DeviceTensor:
    """An array in the GPU's memory, as other libraries have them: still being written, until a stream that waits for it is."""

    def __init__(self, array: np.ndarray, written: bool = False) -> None:
        self.array, self.content = array, None if written else array.copy()
        if not written:
            array.reshape(-1).view(np.uint8)[:] = 0

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("this memory is on a GPU")


class HostGpu:
    """The narrow interface of :mod:`bca_deploy.session.backends.cuda`, in host memory."""

    def __init__(self, capability: str) -> None:
        self.capability = capability
        self.live: weakref.WeakSet[Memory] = weakref.WeakSet()
        self.foreign: list[np.ndarray] = []
        self.streams: dict[int, Stream] = {}
        self.allocated: list[int] = []
        self.uploaded: list[int] = []
        self.captures, self.captures_fail, self.streams_fail = 0, False, False
        self.entered = threading.local()

    def enter(self) -> None:
        self.entered.yes = True

    def stream(self) -> Stream:
        self._check_thread()
        if self.streams_fail:
            raise RuntimeError("CUDA error: out of memory")
        made = Stream()
        self.streams[made.handle] = made
        return made

    def allocate(self, size: int, stream: Stream) -> Memory:
        self._check_thread()
        memory = Memory(size)
        self.live.add(memory)
        self.allocated.append(size)
        return memory

    def upload(self, memory: Memory, array: np.ndarray, stream: Stream) -> None:
        assert array.flags.c_contiguous
        self.uploaded.append(array.ctypes.data)
        source = weakref.ref(array)

        def work() -> None:
            alive = source()
            assert alive is not None, "an array was freed before it was copied"
            memory.bytes[: alive.nbytes] = alive.reshape(-1).view(np.uint8)

        self._put(stream, work)

    def download(self, array: np.ndarray, memory: Memory, stream: Stream) -> None:
        def work() -> None:
            array.reshape(-1).view(np.uint8)[:] = memory.bytes[: array.nbytes]

        self._put(stream, work)

    def poison(self, memory: Memory, stream: Stream) -> None:
        self._put(stream, lambda: memory.bytes.fill(0xFF))

    def capture(self, stream: Stream, enqueue: Callable[[], None]) -> Launch:
        assert not stream.queue
        stream.capturing = True
        try:
            enqueue()
            if self.captures_fail:
                raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            stream.capturing, work, stream.queue = False, stream.queue, []
        self.captures += 1
        return lambda: stream.queue.extend(work)

    def view(self, name: str, value: DeviceTensor, stream: Stream) -> DeviceArray:
        array = value.array
        if not array.flags.c_contiguous:
            raise InputError(f"input {name} has gaps between its elements; give a C-contiguous array")
        if value.content is not None:
            content, value.content = value.content, None
            stream.queue.append(lambda: np.copyto(array, content))
        self.foreign.append(array)
        return DeviceArray(array.ctypes.data, array.shape, array.dtype, value)

    def empty(self, shape: Shape, dtype: np.dtype[Any]) -> DeviceTensor:
        return DeviceTensor(np.full(shape, np.nan, dtype), written=True)

    def at(self, address: int, shape: Shape, dtype: np.dtype[Any]) -> np.ndarray:
        """Return the memory at an address, which must be somebody's."""
        size = int(np.prod(shape)) * dtype.itemsize
        for array in self.foreign:
            if array.ctypes.data == address and array.nbytes == size:
                return array.reshape(shape)
        for memory in list(self.live):
            if memory.handle == address and memory.size >= size:
                return memory.bytes[:size].view(dtype).reshape(shape)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def _put(self, stream: Stream, work: Work) -> None:
        self._check_thread()
        assert not stream.capturing, "copies are not captured"
        stream.queue.append(work)

    def _check_thread(self) -> None:
        if not getattr(self.entered, "yes", False):
            raise RuntimeError("CUDA error: no context is current")


@dataclass
class Network:
    """What NVIDIA's parser says of a model.

    Attributes:
        dtypes: element type of each tensor, by name, inputs first; TensorRT's names.
        shapes: sizes of each, -1 where dynamic.
        inputs: names of the inputs.
    """

    dtypes: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)


def read_network(onnx: Path) -> Network:
    """Let NVIDIA's parser read a model."""
    trt = libraries.load("rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(onnx))
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    # The last output first: nobody may take them by position.
    tensors = [*inputs, *(network.get_output(index) for index in reversed(range(network.num_outputs)))]
    return Network({t.name: t.dtype.name for t in tensors}, {t.name: tuple(t.shape) for t in tensors}, [t.name for t in inputs])


class EngineDouble:
    """``ICudaEngine`` of a bundle's entry.

    Attributes:
        refuses: the method of engine or context that fails.
        contexts: every one made.
        delay_s: how long the work takes.
        writes: whether it writes its outputs.
    """

    device_memory_size_v2 = 4096

    def __init__(self, gpu: HostGpu, network: Network, entry: EngineEntry, signature: Signature, onnx: Path) -> None:
        self.gpu, self.network, self.entry = gpu, network, entry
        self.profiles: list[Ranges] = [shapes(profile, signature.inputs) for profile in entry.profiles]
        self.num_io_tensors, self.num_optimization_profiles = len(network.dtypes), len(entry.profiles)
        self.axes = {t.name: t.axes for t in (*signature.inputs, *signature.outputs)}
        self.dtypes = {t.name: numpy_dtype(t.dtype) for t in (*signature.inputs, *signature.outputs)}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.compute = Compute(onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"]))
        self.refuses, self.delay_s, self.writes, self.capturable = "", 0.0, True, True
        self.contexts: list[ContextDouble] = []
        self.strategies: list[Any] = []

    def get_tensor_name(self, index: int) -> str:
        return list(self.network.dtypes)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.network.dtypes[name])

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name="INPUT" if name in self.network.inputs else "OUTPUT")

    def get_tensor_shape(self, name: str) -> Shape:
        return self.network.shapes[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Shape]:
        return list(self.profiles[profile][name])

    def create_execution_context(self, strategy: Any) -> Any:
        self.strategies.append(strategy)
        if self.refuses == "create_execution_context":
            return None
        self.contexts.append(ContextDouble(self))
        return self.contexts[-1]


class Compute:
    """A model on onnxruntime that gives the same bits for the same inputs: an engine does, and onnxruntime need not."""

    def __init__(self, session: Any) -> None:
        self.session, self.names = session, [output.name for output in session.get_outputs()]
        self.known: dict[tuple[Any, ...], dict[str, np.ndarray]] = {}

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        key = tuple((name, array.shape, array.tobytes()) for name, array in inputs.items())
        if key not in self.known:
            self.known[key] = dict(zip(self.names, self.session.run(self.names, inputs), strict=True))
        return self.known[key]


class ContextDouble:
    """``IExecutionContext``: remembers what was set, and works when its stream does."""

    def __init__(self, engine: EngineDouble) -> None:
        self.engine, self.active_optimization_profile = engine, 0
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.changes = 0
        self.busy = threading.Lock()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        assert self.busy.acquire(blocking=False), "two threads use one context"
        try:
            self.changes += 1
            yield
        finally:
            self.busy.release()

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        with self._changing():
            self.active_optimization_profile, self.shapes = profile, {}
        return self.engine.refuses != "set_optimization_profile_async"

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        low, _, high = self.engine.profiles[self.active_optimization_profile][name]
        with self._changing():
            self.shapes[name] = shape
        return self.engine.refuses != "set_input_shape" and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.network.inputs if name not in self.shapes or self.engine.refuses == "infer_shapes"]

    def get_tensor_shape(self, name: str) -> Shape:
        sizes = {"batch": self.shapes["x"][0], "x_len": self.shapes["x"][1], "context_len": self.shapes["context"][1]}
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.engine.axes[name])

    def set_device_memory(self, memory: int, size: int) -> None:
        with self._changing():
            self.scratch = (memory, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        with self._changing():
            self.addresses[name] = address
        return self.engine.refuses != "set_tensor_address"

    def execute_async_v3(self, handle: int) -> bool:
        stream = self.engine.gpu.streams[handle]
        if self.engine.refuses == "execute_async_v3":
            return False
        changes, shapes, addresses = self.changes, dict(self.shapes), dict(self.addresses)
        outputs = {name: self.get_tensor_shape(name) for name in self.engine.axes if name not in shapes}
        replays = stream.capturing

        def work() -> None:
            assert not replays or self.changes == changes, "a graph's context has changed since it was captured"
            with self._changing():
                self.changes -= 1
                self._compute(shapes | outputs, addresses, wrong=replays and not self.engine.capturable)

        stream.queue.append(work)
        return True

    def _compute(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int], wrong: bool) -> None:
        engine, gpu = self.engine, self.engine.gpu
        scratch = gpu.at(self.scratch[0], (self.scratch[1],), np.dtype(np.uint8))
        assert scratch.nbytes >= engine.device_memory_size_v2
        time.sleep(engine.delay_s)
        arrays = {name: gpu.at(addresses[name], shape, engine.dtypes[name]) for name, shape in shapes.items()}
        results = engine.compute.run({name: arrays[name].copy() for name in engine.network.inputs})
        for name, result in results.items():
            if engine.writes:
                arrays[name][...] = result + wrong


@dataclass
class Machine:
    """A machine whose GPU is the double.

    Attributes:
        gpu: it.
        engines: every engine that was opened.
    """

    gpu: HostGpu
    engines: list[EngineDouble]


def machine(
    monkeypatch: pytest.MonkeyPatch, directory: Path, entry: EngineEntry, capability: str = "sm89", runtime_cache: Any = None
) -> Machine:
    """Make this machine one with a GPU on which engines open, and a bundle's engine one that computes its model."""
    real, found = libraries.load("rtx"), Machine(HostGpu(capability), [])
    network, signature = read_network(directory / entry.model), signature_of_engine(read_manifest(directory), entry)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger, self.engine_host_code_allowed = logger, False

        def deserialize_cuda_engine(self, content: bytes) -> EngineDouble | None:
            if not content.startswith((directory / entry.file).read_bytes()[:64]):
                self.logger.log(real.ILogger.Severity.ERROR, "the engine's header is damaged\nand more")
                return None
            found.engines.append(EngineDouble(found.gpu, network, entry, signature, directory / entry.model))
            return found.engines[-1]

    library = SimpleNamespace(
        ILogger=real.ILogger,
        Runtime=Runtime,
        ExecutionContextAllocationStrategy=real.ExecutionContextAllocationStrategy,
        DynamicShapesKernelSpecializationStrategy=real.DynamicShapesKernelSpecializationStrategy,
        __version__=entry.version,
        **({"IRuntimeCache": runtime_cache} if runtime_cache else {}),
    )
    gpus = Gpus((GpuEntry(name="Double", compute_capability=capability, driver="1"),), "13.0")
    for module in (engine, loaded_engine):
        monkeypatch.setattr(module.libraries, "load", lambda name: library)
    monkeypatch.setattr(engine, "query", lambda: gpus)
    for module in (engine, engine_runner, ort_backend):
        monkeypatch.setattr(module, "open_gpu", lambda: found.gpu)
    return found
