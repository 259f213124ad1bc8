"""Arrays in and out: numpy, torch, and whatever speaks DLPack, on the CPU or the GPU. Nothing is copied on its own device."""

import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.errors import InputError
from bca_deploy.session.backends.cuda import DeviceArray, Gpu, failing_as
from bca_deploy.session.contract import numpy_dtype

Array = NDArray[Any]
#: From a result to what the caller uses.
Back = Callable[[Array], Any]
#: What DLPack calls CUDA's memory (DLDeviceType in dlpack.h).
_DLPACK_CUDA = 2


class Reader:
    """Reads a caller's arrays for one backend; any number of threads may.

    Args:
        gpu: the backend's; None on the CPU.
    """

    def __init__(self, gpu: Gpu | None) -> None:
        self._gpu = gpu
        self._own = threading.local()  # a stream for each thread: none waits for what another's arrays wait for

    def read(self, given: Mapping[str, Any], kind: str = "input") -> dict[str, Array | DeviceArray]:
        """Return views of the arrays, of those on the backend's GPU with their writers waited for.

        Args:
            given: by name.
            kind: what they are, for the error.

        Raises:
            InputError: on another device, of a dtype that numpy has not, or no array at all.
        """
        gpu = self._gpu
        if gpu is None:
            return {name: as_array(name, value, kind) for name, value in given.items()}
        if not any(on_gpu(value) for value in given.values()):
            return {name: as_array(name, value, kind) for name, value in given.items()}
        with failing_as(f"reading the {kind}s"):
            return self._read(gpu, given, kind)

    def _read(self, gpu: Gpu, given: Mapping[str, Any], kind: str) -> dict[str, Array | DeviceArray]:
        stream, found = self._stream(gpu), dict[str, Array | DeviceArray]()
        for name, value in given.items():
            found[name] = gpu.view(name, _plain(value), stream) if on_gpu(value) else as_array(name, value, kind)
        stream.sync()
        return found

    def make(self, like: Iterable[Any], shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Any:
        """Return a new array on the GPU: a torch tensor where any of ``like`` is one, else one that speaks DLPack."""
        assert self._gpu is not None  # noqa: S101  (an input was there)
        torch = sys.modules.get("torch")
        with failing_as("making the outputs"):
            self._gpu.enter()
            for value in like:
                if torch is not None and isinstance(value, torch.Tensor) and on_gpu(value):
                    return torch.empty(shape, dtype=getattr(torch, dtype.name), device=value.device)
            return self._gpu.empty(shape, dtype)

    def _stream(self, gpu: Gpu) -> Any:
        gpu.enter()
        if not hasattr(self._own, "stream"):
            self._own.stream = gpu.stream()
        return self._own.stream


def on_gpu(value: Any) -> bool:
    """Whether an array is in CUDA's memory."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack_device__"):
        return False
    return bool(value.__dlpack_device__()[0] == _DLPACK_CUDA)


def _plain(value: Any) -> Any:
    """Return a torch tensor without its gradients, which DLPack does not carry, and with masks of 0 and 1 alone.

    A mask on the GPU cannot be looked at without waiting for it; it is made anew in the order of torch's own stream.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    return value.view(torch.uint8) != 0 if value.dtype == torch.bool else value


def as_array(name: str, value: Any, kind: str = "input") -> Array:
    """Return a numpy view of ``value``.

    Args:
        name: of the input, for the error.
        kind: whether it is one.
        value: a numpy array, a torch tensor or any other DLPack object, on the CPU.

    Raises:
        InputError: on another device, of a dtype that numpy has not, or no array at all.
    """
    if isinstance(value, np.ndarray):
        return value
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _from_torch(f"{kind} {name}", name, value)
    if hasattr(value, "__dlpack__"):
        return _from_dlpack(f"{kind} {name}", value)
    raise InputError(
        f"{kind} {name} is a {type(value).__name__}; give a numpy array, a torch tensor or another array with __dlpack__"
    )


def _from_torch(what: str, name: str, value: Any) -> Array:
    if value.device.type != "cpu":
        raise InputError(f"{what} is on {value.device}, where this session does not run; give {name}.cpu()")
    value = value.detach()
    if str(value.dtype) == "torch.bfloat16":  # numpy has it from ml_dtypes, and torch does not know that
        return np.asarray(value.view(sys.modules["torch"].int16).numpy().view(numpy_dtype("bfloat16")))
    try:
        return np.asarray(value.numpy())
    except TypeError as error:
        raise InputError(f"{what} has dtype {value.dtype}, which numpy has not; give {name}.float()") from error


def _from_dlpack(what: str, value: Any) -> Array:
    try:
        array: Array = np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, AssertionError) as error:
        raise InputError(f"{what}, a {type(value).__name__}, does not come as a CPU array: {error}") from error
    return array


def check_overlaps(inputs: Mapping[str, Array | DeviceArray], outputs: Mapping[str, Array | DeviceArray]) -> None:
    """Refuse an output that shares memory with an input or with another output: a model writes while it still reads.

    Args:
        inputs: C-contiguous, as the backend reads them.
        outputs: C-contiguous, as it writes them.

    Raises:
        InputError: naming both.
    """
    taken = [(f"input {name}", array) for name, array in inputs.items()]
    for name, output in outputs.items():
        for other, array in taken:
            if _overlap(output, array):
                raise InputError(f"output {name} overlaps {other} in memory; give each output memory of its own")
        taken.append((f"output {name}", output))


def _overlap(one: Array | DeviceArray, other: Array | DeviceArray) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.may_share_memory(one, other)  # compares bounds alone, and there are no gaps between them
    if isinstance(one, DeviceArray) and isinstance(other, DeviceArray):
        return one.address < other.end and other.address < one.end
    return False


def back(values: Iterable[Any]) -> Back | None:
    """Return what turns results into torch tensors where any input was one; None where they stay numpy arrays."""
    torch = sys.modules.get("torch")
    if torch is not None:
        for value in values:
            if isinstance(value, torch.Tensor):
                return _to_torch
    return None


def _to_torch(array: Array) -> Any:
    torch = sys.modules["torch"]
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
