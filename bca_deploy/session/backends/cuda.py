"""What running an engine needs of a GPU: memory, streams, copies, graphs. A narrow interface, and cuda-core behind it.

Everything that touches CUDA goes through :class:`Gpu`, so that the rest is tested on machines without one.
"""

from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bca_deploy.errors import BcaError, EngineError, InputError, MissingDependencyError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    import cuda.core

Array = NDArray[Any]
#: Launches what was captured, in the stream that it was captured on.
Launch = Callable[[], None]


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A C-contiguous array in the GPU's memory, somebody else's.

    Attributes:
        address: of its first element.
        shape: its sizes.
        dtype: its element type.
        owner: what keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any

    @property
    def end(self) -> int:
        """The address after its last element."""
        return self.address + int(np.prod(self.shape)) * self.dtype.itemsize


class Stream(Protocol):
    """Work in order. ``handle`` is the driver's, as a number."""

    @property
    def handle(self) -> int:
        """The driver's stream."""

    def sync(self) -> None:
        """Wait for all of its work."""


class Memory(Protocol):
    """Memory on the GPU; it is freed when nothing refers to it."""

    @property
    def handle(self) -> int:
        """Its address."""

    @property
    def size(self) -> int:
        """Its bytes."""


class Gpu(Protocol):
    """One GPU. What takes a stream only enqueues; waiting is the stream's."""

    @property
    def capability(self) -> str:
        """Its compute capability, such as ``sm89``."""

    def enter(self) -> None:
        """Make this GPU the calling thread's; every thread does that before it uses anything else here."""

    def stream(self) -> Any:
        """Return a new stream."""

    def allocate(self, size: int, stream: Any) -> Any:
        """Return ``size`` bytes, aligned to 256."""

    def upload(self, memory: Any, array: Array, stream: Any) -> None:
        """Copy a C-contiguous array to the GPU; it must not change before the stream is waited for."""

    def download(self, array: Array, memory: Any, stream: Any) -> None:
        """Copy from the GPU into a C-contiguous array."""

    def poison(self, memory: Any, stream: Any) -> None:
        """Make every float in it NaN."""

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Launch:
        """Return what launches the work that ``enqueue`` puts into the stream, which is not done now."""

    def view(self, name: str, value: Any, stream: Any) -> DeviceArray:
        """Return the memory of a DLPack array on this GPU; the stream waits for whatever writes it.

        Raises:
            InputError: on another device, not C-contiguous, or of a dtype that numpy has not.
        """

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return a new array that speaks DLPack."""


@contextmanager
def failing_as(what: str) -> "Iterator[None]":
    """Turn what CUDA raises into an :class:`EngineError`; its exceptions share no base of their own."""
    try:
        yield
    except BcaError:
        raise
    except Exception as error:
        first = first_line(error)
        raise EngineError(f"{what} failed on the GPU: {first}") from error


def open_gpu(device: int = 0) -> "CudaCore":
    """Return a GPU by its number among those that this process may see.

    Raises:
        MissingDependencyError: cuda-core is not installed.
        EngineError: CUDA does not start, or there is no such GPU.
    """
    try:
        core = import_module("cuda.core")
    except ImportError:
        raise MissingDependencyError("cuda-core is not installed; run: pip install cuda-core cuda-bindings") from None
    with failing_as(f"opening GPU {device}"):
        opened: cuda.core.Device = core.Device(device)
        opened.set_current()
    return CudaCore(opened)


class CudaCore:
    """:class:`Gpu` on cuda-core."""

    def __init__(self, device: "cuda.core.Device") -> None:
        self.device = device

    @property
    def capability(self) -> str:
        """As CUDA counts its devices, which need not be the driver's order."""
        with failing_as("asking for the compute capability"):
            major, minor = self.device.compute_capability
        return f"sm{major}{minor}"

    def enter(self) -> None:
        """Make the device's primary context, which torch and onnxruntime use too, the thread's."""
        self.device.set_current()

    def stream(self) -> "cuda.core.Stream":
        """Return a new stream, which does not wait for the default one."""
        return self.device.create_stream()

    def allocate(self, size: int, stream: "cuda.core.Stream") -> "cuda.core.Buffer":
        """Return memory from the device's pool, which gives multiples of 256 bytes."""
        return self.device.allocate(size, stream=stream)

    def upload(self, memory: "cuda.core.Buffer", array: Array, stream: "cuda.core.Stream") -> None:
        """Copy to the GPU."""
        _part(memory, array.nbytes).copy_from(_host(array), stream=stream)

    def download(self, array: Array, memory: "cuda.core.Buffer", stream: "cuda.core.Stream") -> None:
        """Copy from the GPU."""
        _host(array).copy_from(_part(memory, array.nbytes), stream=stream)

    def poison(self, memory: "cuda.core.Buffer", stream: "cuda.core.Stream") -> None:
        """Set every bit: a NaN in every floating-point format here."""
        memory.fill(0xFF, stream=stream)

    def capture(self, stream: "cuda.core.Stream", enqueue: Callable[[], None]) -> Launch:
        """Return the launch of a graph; other threads may go on using CUDA meanwhile."""
        builder = stream.create_graph_builder()
        builder.begin_building(mode="thread_local")
        try:
            enqueue()
        except BaseException:
            with suppress(Exception):  # the stream must not stay in capture, and the first error is the one to tell
                builder.end_building()
            raise
        builder.end_building()
        graph = builder.complete()
        return lambda: graph.launch(stream)

    def view(self, name: str, value: Any, stream: "cuda.core.Stream") -> DeviceArray:
        """Return the memory of a DLPack array."""
        from cuda.core.utils import StridedMemoryView

        try:
            seen = StridedMemoryView.from_dlpack(value, stream_ptr=int(stream.handle))
            return array_of(name, seen, value, self.device.device_id)
        except (BufferError, RuntimeError, TypeError, NotImplementedError) as error:
            raise InputError(f"input {name}, a {type(value).__name__}, does not come as a GPU array: {error}") from error

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return a ``cuda.core`` view, from which cupy, torch and jax take over by DLPack."""
        from cuda.core.utils import StridedMemoryView

        size = int(np.prod(shape)) * dtype.itemsize
        buffer = self.device.allocate(size, stream=self.device.default_stream)
        self.device.default_stream.sync()
        return StridedMemoryView.from_buffer(buffer, shape, itemsize=dtype.itemsize, dtype=dtype)


def _host(array: Array) -> "cuda.core.Buffer":
    from cuda.core import Buffer

    return Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array)


def _part(memory: "cuda.core.Buffer", size: int) -> "cuda.core.Buffer":
    """Return the first bytes of a buffer that has grown larger; copies want equal sizes."""
    from cuda.core import Buffer

    return memory if memory.size == size else Buffer.from_handle(int(memory.handle), size, owner=memory)


def array_of(name: str, seen: Any, owner: Any, device: int) -> DeviceArray:
    """Return what cuda-core sees of an array.

    Raises:
        InputError: on another device, or with gaps between its elements.
    """
    if seen.device_id != device:
        raise InputError(f"input {name} is on GPU {seen.device_id}, and this session runs on {device}; move it there")
    shape = tuple(seen.shape)
    if seen.strides is not None and not _row_major(shape, tuple(seen.strides)):
        raise InputError(f"input {name} has gaps between its elements; give a C-contiguous array")
    return DeviceArray(seen.ptr, shape, np.dtype(seen.dtype), (seen, owner))


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements lie one after another; where an axis has one, its stride means nothing."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
