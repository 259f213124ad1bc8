"""Arrays in and out: numpy, torch, and whatever speaks DLPack. Nothing is copied where it lies on the CPU already."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bca_deploy.errors import InputError

Array = NDArray[Any]
#: From a result to what the caller uses.
Back = Callable[[Array], Any]


def as_array(name: str, value: Any) -> Array:
    """Return a numpy view of ``value``.

    Args:
        name: of the input, for the error.
        value: a numpy array, a torch tensor or any other DLPack object, on the CPU.

    Raises:
        InputError: on another device, of a dtype that numpy has not, or no array at all.
    """
    if isinstance(value, np.ndarray):
        return value
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _from_torch(name, value)
    if hasattr(value, "__dlpack__"):
        return _from_dlpack(name, value)
    raise InputError(
        f"input {name} is a {type(value).__name__}; give a numpy array, a torch tensor or another array with __dlpack__"
    )


def _from_torch(name: str, value: Any) -> Array:
    if value.device.type != "cpu":
        raise InputError(f"input {name} is on {value.device}, and this session runs on the CPU; give {name}.cpu()")
    try:
        array: Array = value.detach().numpy()
    except TypeError as error:  # bfloat16
        raise InputError(
            f"input {name} has dtype {value.dtype}, which this session cannot take; give {name}.float()"
        ) from error
    return array


def _from_dlpack(name: str, value: Any) -> Array:
    try:
        array: Array = np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, AssertionError) as error:
        raise InputError(f"input {name}, a {type(value).__name__}, does not come as a CPU array: {error}") from error
    return array


def back(values: Iterable[Any]) -> Back:
    """Return what turns results into the kind of array that came in: torch where any input was torch, else numpy."""
    torch = sys.modules.get("torch")
    if torch is not None and any(isinstance(value, torch.Tensor) for value in values):
        convert: Back = torch.from_numpy
        return convert
    return lambda array: array
