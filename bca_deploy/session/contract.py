"""What a model takes, checked before the call: names, dtypes, ranks, sizes. The one place where a request is refused."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bca_deploy.errors import InputError, nearest
from bca_deploy.spec import Axis, DimRange, Dims

if TYPE_CHECKING:
    from bca_deploy.bundle.manifest import TensorEntry
    from bca_deploy.session.backends.cuda import DeviceArray

Array = NDArray[Any]
AnyArray: TypeAlias = "Array | DeviceArray"
#: One request of ``run_many``: ``(x, context)``, or with masks ``(x, context, mask, context_mask)``.
Pair = Sequence[Any]

_OPTIONAL = ("mask", "context_mask")
#: The mask that says what is padding along an axis.
_MASK_OF = {"x_len": "mask", "context_len": "context_mask"}
#: Accepted shapes that are remembered.
_MOST_SHAPES = 1000


@dataclass(frozen=True, slots=True)
class _Input:
    name: str
    dtype: np.dtype[Any]
    axes: tuple[Axis, ...]
    optional: bool


class Contract:
    """The inputs of one model.

    Args:
        tensors: the model's inputs, in order.
        dims: the sizes that the named dimensions may take.
        profiles: the combinations of sizes, where not every one within ``dims`` will do.
    """

    def __init__(self, tensors: "Iterable[TensorEntry]", dims: Dims, profiles: tuple[Dims, ...] = ()) -> None:
        self._inputs = [_Input(t.name, numpy_dtype(t.dtype), t.axes, t.name in _OPTIONAL) for t in tensors]
        self.names = tuple(entry.name for entry in self._inputs)
        self._dtypes = [(entry.name, entry.dtype) for entry in self._inputs]
        self._accepted: set[tuple[tuple[int, ...], ...]] = set()
        self._ranges: dict[str, DimRange] = {name: getattr(dims, name) for name in ("batch", "x_len", "context_len")}
        self._profiles = profiles
        # Padding that no mask tells of would be attended to.
        self._pad = "pad and mask the padding, " if set(_OPTIONAL) <= set(self.names) else ""
        self._bools = tuple(entry.name for entry in self._inputs if entry.dtype == np.bool_)

    def bind(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs by name; ``None`` counts as not given.

        Raises:
            InputError: too many, given twice, or unknown.
        """
        if len(args) > len(self.names):
            raise InputError(f"{len(args)} inputs by position, but the model takes {len(self.names)}: {', '.join(self.names)}")
        given = {name: value for name, value in zip(self.names, args, strict=False) if value is not None}
        for name, value in named.items():
            if value is None:
                continue
            if name not in self.names:
                raise InputError(
                    f"the model has no input {name!r}{nearest(name, self.names)}; it takes {', '.join(self.names)}"
                )
            if name in given:
                raise InputError(f"input {name} is given twice, by position and by name")
            given[name] = value
        return given

    def check(self, given: Mapping[str, AnyArray], cast: bool = False) -> dict[str, AnyArray]:
        """Return every input as the model takes it; masks that were not given are all true.

        Args:
            given: arrays by name, on the CPU or the GPU.
            cast: turn other floating-point dtypes, and masks of 0 and 1, into the model's dtypes.

        Raises:
            InputError: naming the input, the axis, what it got, what is allowed and the way out.
        """
        shapes = self._shapes(given)
        if shapes in self._accepted:
            self._check_bools(given)
            return dict(given)
        ready = self._checked(given, cast)
        if shapes is not None and len(self._accepted) < _MOST_SHAPES:
            self._accepted.add(shapes)
        return ready

    def _shapes(self, given: Mapping[str, AnyArray]) -> tuple[tuple[int, ...], ...] | None:
        """Return the shapes of all inputs in order; None where one is missing or of another dtype.

        Shapes that were accepted once are again: a server's calls repeat them, and the whole check costs 20 µs after a model
        has filled the caches with its weights.
        """
        found = []
        for name, dtype in self._dtypes:
            array = given.get(name)
            if array is None or array.dtype != dtype:
                return None
            found.append(array.shape)
        return tuple(found)

    def _checked(self, given: Mapping[str, AnyArray], cast: bool) -> dict[str, AnyArray]:
        sizes = self._sizes(given)  # of all, before anything is made of any
        self._check_bools(given)
        ready: dict[str, AnyArray] = {}
        for entry in self._inputs:
            array = given.get(entry.name)
            if array is None:
                ready[entry.name] = np.ones(shape_of(entry.axes, sizes), np.bool_)
            else:
                ready[entry.name] = array if array.dtype == entry.dtype else self._cast(entry, array, cast)
        return ready

    def _check_bools(self, given: Mapping[str, AnyArray]) -> None:
        """Refuse a byte that is neither 0 nor 1, as views make them: a kernel may take it for either. On the GPU nobody looks.

        By way of bytes, as a maximum of numpy's takes longer to begin than most masks to be read.
        """
        for name in self._bools:
            array = given.get(name)
            if not isinstance(array, np.ndarray) or array.dtype != np.bool_:
                continue
            if others := array.tobytes().translate(None, b"\0\1"):
                raise InputError(
                    f"input {name}: a bool is one byte of 0 or 1, and here is one of {others[0]}; write 1 where it is true"
                )

    def _sizes(self, given: Mapping[str, AnyArray]) -> dict[str, int]:
        """Return the size of each named dimension, checked against everything that is known of it."""
        found: dict[str, tuple[int, str]] = {}
        for entry in self._inputs:
            array = given.get(entry.name)
            if array is not None:
                self._check_shape(entry, array.shape, found)
            elif not entry.optional:
                raise InputError(f"input {entry.name} is missing; the model takes {', '.join(self.names)}")
        sizes = {name: size for name, (size, _) in found.items()}
        if self._profiles and not any(profile.holds(sizes) for profile in self._profiles):
            got = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise InputError(
                f"no optimization profile of the engine holds {got}; it has {'; or '.join(map(str, self._profiles))}; "
                f"{self._pad}split the batch, or build the engine with a profile for it"
            )
        return sizes

    def _check_shape(self, entry: _Input, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
        if len(shape) != len(entry.axes):
            raise InputError(
                f"input {entry.name} has {len(shape)} axes {list(shape)}, and needs {len(entry.axes)}: {_shown(entry.axes)}"
            )
        for index, (axis, size) in enumerate(zip(entry.axes, shape, strict=True)):
            if isinstance(axis, int):
                if size != axis:
                    raise InputError(f"input {entry.name}: axis {index} is {size}, and must be {axis}: {_shown(entry.axes)}")
                continue
            known = sizes.get(axis)
            if known is None:
                self._check_range(entry, index, axis, size)
                sizes[axis] = (size, entry.name)
            elif known[0] != size:
                raise InputError(
                    f"input {entry.name}: axis {index} ({axis}) is {size}, but {known[1]} has {known[0]}; they must agree"
                )

    def _check_range(self, entry: _Input, index: int, axis: str, size: int) -> None:
        allowed = self._ranges[axis]
        if not allowed.min <= size <= allowed.max:
            raise InputError(
                f"input {entry.name}: axis {index} ({axis}) is {size}, allowed {allowed.min} to {allowed.max}; "
                f"{self._way_out(axis, size, allowed)}"
            )

    def _way_out(self, axis: str, size: int, allowed: DimRange) -> str:
        """Return what to do, and the answers are the same: the entries of a batch are apart, the rows of a sequence are not."""
        batch = axis == "batch"
        again = "build the engine with a profile for it" if self._profiles else "export again with wider dims"
        if size < 1:
            return "an empty batch has nothing to run" if batch else "nothing attends to an empty sequence; leave its entry out"
        if size > allowed.max:
            no = "a sequence cannot be cut, as each row attends to all of the other side"
            return f"split the batch, or {again}" if batch else f"{no}; {again}"
        if batch:
            return f"add entries and drop their outputs, or {again}"
        return f"pad it and mask the padding, or {again}" if _MASK_OF[axis] in self.names else again

    def _cast(self, entry: _Input, array: AnyArray, cast: bool) -> Array:
        mask = entry.dtype == np.bool_
        possible = array.dtype.kind in "iu" if mask else array.dtype.kind == "f" or array.dtype.name == "bfloat16"
        if not cast or not possible or not isinstance(array, np.ndarray):
            way_out = "; cast=True converts it" if isinstance(array, np.ndarray) else "; convert it on the GPU"
            hint = way_out if possible else ""
            raise InputError(f"input {entry.name} has dtype {array.dtype}, and needs {entry.dtype}{hint}")
        if mask and (others := array[(array != 0) & (array != 1)]).size:
            raise InputError(f"input {entry.name}: a mask of integers must hold 0 and 1 alone, and it holds {others[0]}")
        with np.errstate(over="ignore"):  # checked below, with a better message
            converted = array.astype(entry.dtype)
        if not mask and (over := np.isfinite(array) & ~np.isfinite(converted)).any():
            largest = np.abs(array[over]).max()
            raise InputError(f"input {entry.name} holds {largest:.3g}, more than {entry.dtype} can; scale it down")
        return converted


def shape_of(axes: tuple[Axis, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a tensor's shape: a number is fixed, a name stands for its size."""
    return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in axes)


def sizes_of(inputs: "Mapping[str, AnyArray]") -> dict[str, int]:
    """Return the size of each named dimension of a checked call."""
    return {"batch": inputs["x"].shape[0], "x_len": inputs["x"].shape[1], "context_len": inputs["context"].shape[1]}


def _shown(axes: tuple[Axis, ...]) -> str:
    return f"[{', '.join(map(str, axes))}]"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return numpy's element type of that name; bfloat16 is ml_dtypes'."""
    if name == "bfloat16":
        import ml_dtypes  # noqa: F401  (gives numpy the name)
    return np.dtype(name)
