"""What a model takes, checked before the call: names, dtypes, ranks, sizes. The one place where a request is refused."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bca_deploy.errors import InputError, nearest
from bca_deploy.signature import Axis, DimRange, Dims, Signature, Tensor

if TYPE_CHECKING:
    from bca_deploy.session.backends.cuda import DeviceArray

Array = NDArray[Any]
AnyArray: TypeAlias = "Array | DeviceArray"
#: One request of ``run_many``: the inputs in the model's order, as many as there are to give.
Pair = Sequence[Any]

#: Accepted shapes that are remembered.
_MOST_SHAPES = 1000


class Contract:
    """The inputs of one model.

    Args:
        signature: what it takes.
        profiles: the combinations of sizes, where not every one within the signature's ranges will do.
        left_out: what the export left out, by name, each with the option that decides about it.
    """

    def __init__(
        self,
        signature: Signature,
        profiles: tuple[Dims, ...] = (),
        left_out: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._signature, self._profiles, self._left_out = signature, profiles, left_out
        self.names = tuple(tensor.name for tensor in signature.inputs)
        self._dtypes = {tensor.name: numpy_dtype(tensor.dtype) for tensor in signature.inputs}
        self._masks = frozenset(signature.masks.values())
        # A mask of one entry or one length is spread over the sizes that the others have.
        self._masks_last = sorted(signature.inputs, key=lambda tensor: tensor.name in self._masks)
        self._bools = tuple(tensor.name for tensor in signature.inputs if tensor.dtype == "bool")
        self._accepted: set[tuple[tuple[int, ...], ...]] = set()

    def bind(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs by name, as :func:`bind` does."""
        return bind(self.names, args, named, self._left_out)

    def check(self, given: Mapping[str, AnyArray], cast: bool = False) -> dict[str, AnyArray]:
        """Return every input as the model takes it; one that may be left out, and was, holds its fill.

        Args:
            given: arrays by name, on the CPU or the GPU.
            cast: turn other floating-point dtypes, other integers, and masks of 0 and 1, into the model's dtypes.

        A mask is spread as the layer does it: ``[1, N]`` over the batch, ``[B, 1]`` over the length.

        Raises:
            InputError: naming the input, the axis, what it got, what is allowed and the way out.
        """
        shapes = self._shapes(given)
        if shapes in self._accepted:
            for name in self._bools:
                _check_bytes(name, given[name])
            return dict(given)
        ready = self._checked(given, cast)
        as_given = shapes == tuple(array.shape for array in ready.values())  # else a mask was spread
        if shapes is not None and as_given and len(self._accepted) < _MOST_SHAPES:
            self._accepted.add(shapes)
        return ready

    def _shapes(self, given: Mapping[str, AnyArray]) -> tuple[tuple[int, ...], ...] | None:
        """Return the shapes of all inputs in order; None where one is missing or of another dtype.

        Shapes that were accepted once are again: a server's calls repeat them, and the whole check costs 20 µs after a model
        has filled the caches with its weights.
        """
        found = []
        for name, dtype in self._dtypes.items():
            array = given.get(name)
            if array is None or (array.dtype is not dtype and array.dtype != dtype):  # nearly always it is the one object
                return None
            found.append(array.shape)
        return tuple(found)

    def _checked(self, given: Mapping[str, AnyArray], cast: bool) -> dict[str, AnyArray]:
        sizes = self._sizes(given)  # of all, before anything is made of any
        ready: dict[str, AnyArray] = {}
        for tensor in self._signature.inputs:
            array, dtype = given.get(tensor.name), self._dtypes[tensor.name]
            if array is None:
                ready[tensor.name] = np.full(tensor.shape(sizes), tensor.fill, dtype)
            else:
                made = converted(tensor.name, dtype, array, cast, tensor.name in self._masks)
                ready[tensor.name] = _spread(tensor, made, tensor.shape(sizes))
        return ready

    def _sizes(self, given: Mapping[str, AnyArray]) -> dict[str, int]:
        """Return the size of each named dimension, checked against everything that is known of it."""
        found: dict[str, tuple[int, str]] = {}
        for tensor in self._masks_last:
            array = given.get(tensor.name)
            if array is not None:
                self._check_shape(tensor, array.shape, found)
            elif tensor.fill is None:
                raise InputError(f"input {tensor.name} is missing; the model takes {', '.join(self.names)}")
        sizes = {name: size for name, (size, _) in found.items()}
        if self._profiles and not any(profile.holds(sizes) for profile in self._profiles):
            self._refuse_profiles(sizes)
        return sizes

    def _refuse_profiles(self, sizes: Mapping[str, int]) -> None:
        got = ", ".join(f"{name} {sizes[name]}" for name in self._signature.dims)
        # Padding that no mask tells of would be attended to.
        pad = "pad and mask the padding, " if self._signature.masks_all else ""
        split = "split the batch, or " if self._signature.batch else ""
        raise InputError(
            f"no optimization profile of the engine holds {got}; it has {'; or '.join(map(str, self._profiles))}; "
            f"{pad}{split}build the engine with a profile for it"
        )

    def _check_shape(self, tensor: Tensor, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
        for index, axis, size in named_axes(tensor, shape):
            known = sizes.get(axis)
            if known is None:
                self._check_range(tensor, index, axis, size)
                sizes[axis] = (size, tensor.name)
            elif known[0] != size and not (size == 1 and tensor.name in self._masks):
                raise InputError(
                    f"input {tensor.name}: axis {index} ({axis}) is {size}, but {known[1]} has {known[0]}; they must agree"
                )

    def _check_range(self, tensor: Tensor, index: int, axis: str, size: int) -> None:
        allowed = self._signature.dims[axis]
        if not allowed.min <= size <= allowed.max:
            raise InputError(
                f"input {tensor.name}: axis {index} ({axis}) is {size}, allowed {allowed.min} to {allowed.max}; "
                f"{self._way_out(axis, size, allowed)}"
            )

    def _way_out(self, axis: str, size: int, allowed: DimRange) -> str:
        """Return what to do, and the answers are the same: the entries of a batch are apart, the rows of a sequence are not."""
        batch = axis == self._signature.batch
        again = "build the engine with a profile for it" if self._profiles else "export again with wider dims"
        if size < 1:
            return "an empty batch has nothing to run" if batch else "nothing attends to an empty sequence; leave its entry out"
        if size > allowed.max:
            no = "a sequence cannot be cut, as each row attends to all of the other side"
            return f"split the batch, or {again}" if batch else f"{no}; {again}"
        if batch:
            return f"add entries and drop their outputs, or {again}"
        return f"pad it and mask the padding, or {again}" if axis in self._signature.masks else again


def _spread(tensor: Tensor, array: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    """Return a mask of one entry or one length over the whole shape; everything else has it already."""
    if array.shape == shape:
        return array
    if not isinstance(array, np.ndarray):
        raise InputError(f"input {tensor.name} is {list(array.shape)} on the GPU, and needs {list(shape)}; expand it there")
    return np.ascontiguousarray(np.broadcast_to(array, shape))


def how_to_have(name: str, left_out: Mapping[str, str]) -> str:
    """Return which option of the export decides about what it left out; nothing where it is unknown."""
    return f"; this export left it out: bca-export {left_out[name]}" if name in left_out else ""


def bind(
    names: Sequence[str], args: tuple[Any, ...], named: Mapping[str, Any], left_out: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Return a call's arguments by the names of the inputs; ``None`` counts as not given.

    Raises:
        InputError: too many, given twice, or unknown.
    """
    if len(args) > len(names):
        raise InputError(f"{len(args)} inputs by position, but the model takes {len(names)}: {', '.join(names)}")
    given = {name: value for name, value in zip(names, args, strict=False) if value is not None}
    for name, value in named.items():
        if value is None:
            continue
        if name not in names:
            told = f"the model has no input {name!r}{nearest(name, names)}; it takes {', '.join(names)}"
            raise InputError(told + how_to_have(name, left_out))
        if name in given:
            raise InputError(f"input {name} is given twice, by position and by name")
        given[name] = value
    return given


def converted(name: str, dtype: np.dtype[Any], array: AnyArray, cast: bool, is_mask: bool = False) -> AnyArray:
    """Return an input in the model's element type: itself where it has that already.

    Args:
        name: for the error.
        dtype: the model's.
        array: as it was given.
        cast: turn other floating-point dtypes, other integers, and masks of 0 and 1, into the model's.
        is_mask: whether it is a mask, of integers too.

    Raises:
        InputError: another dtype, a value that the model's cannot hold, or a bool of another byte than 0 and 1.
    """
    if array.dtype == dtype:
        if dtype == np.bool_:
            _check_bytes(name, array)
        return array
    kind = "f" if array.dtype.name == "bfloat16" else array.dtype.kind
    possible = kind in {"b": "iuf", "i": "iubf" if is_mask else "iu"}.get(dtype.kind, "f")
    if not cast or not possible or not isinstance(array, np.ndarray):
        way_out = "; cast=True converts it" if isinstance(array, np.ndarray) else "; convert it on the GPU"
        raise InputError(f"input {name} has dtype {array.dtype}, and needs {dtype}{way_out if possible else ''}")
    if dtype.kind == "b" or (dtype.kind == "i" and kind in "bf"):
        _check_zeros_and_ones(name, array.view(np.uint8) if kind == "b" else array, kind)
    with np.errstate(over="ignore"):  # checked below, with a better message
        made = array.astype(dtype)
    if dtype.kind == "i" and (others := array[made != array]).size:
        raise InputError(f"input {name} holds {others[0]}, more than {dtype} can")
    if kind == "f" and (over := np.isfinite(array) & ~np.isfinite(made)).any():
        largest = np.abs(array[over]).max()
        raise InputError(f"input {name} holds {largest:.3g}, more than {dtype} can; scale it down")
    return made


def _check_zeros_and_ones(name: str, array: Array, kind: str) -> None:
    if (others := array[(array != 0) & (array != 1)]).size:
        of, shown = ("integers", str(others[0])) if kind in "iu" else ("numbers", f"{float(others[0]):.3g}")
        raise InputError(f"input {name}: a mask of {of} must hold 0 and 1 alone, and it holds {shown}")


def _check_bytes(name: str, array: AnyArray) -> None:
    """Refuse a byte that is neither 0 nor 1, as views make them: a kernel may take it for either. On the GPU nobody looks.

    By way of bytes, as a maximum of numpy's takes longer to begin than most masks to be read.
    """
    if isinstance(array, np.ndarray) and (others := array.tobytes().translate(None, b"\0\1")):
        raise InputError(
            f"input {name}: a bool is one byte of 0 or 1, and here is one of {others[0]}; write 1 where it is true"
        )


def named_axes(tensor: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[int, str, int]]:
    """Yield the place, the name and the size of each axis that varies; those before it were found to be right.

    Raises:
        InputError: another number of axes, or another size than a fixed one.
    """
    if len(shape) != len(tensor.axes):
        raise InputError(
            f"input {tensor.name} has {len(shape)} axes {list(shape)}, and needs {len(tensor.axes)}: {_shown(tensor.axes)}"
        )
    for index, (axis, size) in enumerate(zip(tensor.axes, shape, strict=True)):
        if isinstance(axis, str):
            yield index, axis, size
        elif size != axis:
            raise InputError(f"input {tensor.name}: axis {index} is {size}, and must be {axis}: {_shown(tensor.axes)}")


def _shown(axes: tuple[Axis, ...]) -> str:
    return f"[{', '.join(map(str, axes))}]"


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return numpy's element type of that name; bfloat16 is ml_dtypes'."""
    if name == "bfloat16":
        import ml_dtypes  # noqa: F401  (gives numpy the name)
    return np.dtype(name)
