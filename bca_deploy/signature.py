"""What a model takes and gives, as data: named tensors, named dimensions, what may be left out, which input masks what.

The one description that every stage reads, from the export to the servers and the C++ runtime. Plain Python: Triton's front
carries it, too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from bca_deploy.arithmetic import LIMIT, names_in, value_of
from bca_deploy.errors import InputError

#: A fixed size, the name of a dimension, or of an output what follows from dimensions (arithmetic.py).
Axis = str | int
DType = Literal["float32", "float16", "bfloat16", "bool", "int32", "int64"]

#: Of a name, in bytes: errors, logs and labels hold it.
_LONGEST_NAME = 255

# Read by pydantic where these classes stand in a recipe or a manifest: an unknown key is an error.
_STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class DimRange:
    """The sizes that one named dimension may take: the smallest, the one to tune for, the largest.

    Raises:
        InputError: unless ``1 <= min <= opt <= max < 2**63``.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(f"dimension range min {self.min}, opt {self.opt}, max {self.max}: needs 1 <= min <= opt <= max")
        if self.max >= LIMIT:
            raise InputError(f"dimension range max {self.max} is more than 64 bits hold; at most {LIMIT - 1}")

    def clip(self, size: int) -> int:
        """Return the size in this range that is nearest to ``size``."""
        return min(max(size, self.min), self.max)


class Dims(Mapping[str, DimRange]):
    """The named dimensions, in order, each with its range. The same name means the same size in every tensor of one call."""

    def __init__(self, ranges: Mapping[str, DimRange] | None = None, /, **named: DimRange) -> None:
        self._ranges = {**(ranges or {}), **named}

    def __getitem__(self, name: str) -> DimRange:
        """Return the range of one dimension."""
        return self._ranges[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._ranges)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._ranges)

    def __hash__(self) -> int:
        """Two are the same in any order."""
        return hash(frozenset(self._ranges.items()))

    def __repr__(self) -> str:
        """As it is written."""
        return f"Dims({', '.join(f'{name}={size}' for name, size in self._ranges.items())})"

    def __str__(self) -> str:
        """In words."""
        return ", ".join(f"{name} {r.min} to {r.max}" for name, r in self._ranges.items())

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether every size, by the dimension's name, is in its range."""
        return all(self._ranges[name].min <= size <= self._ranges[name].max for name, size in sizes.items())

    def at(self, which: Literal["min", "opt", "max"]) -> dict[str, int]:
        """Return the smallest, the optimal or the largest size of each."""
        return {name: getattr(found, which) for name, found in self._ranges.items()}

    def named(self, shape: Sequence[int]) -> dict[str, int]:
        """Return the sizes by name of a shape that has one for each dimension, in order.

        Raises:
            InputError: one too many, or too few.
        """
        if len(shape) != len(self):
            raise InputError(f"shape {'x'.join(map(str, shape))}: give {len(self)} sizes, of {', '.join(self)}")
        return dict(zip(self, shape, strict=True))

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, handler: Any) -> dict[str, Any]:
        """Tell pydantic, which need not be here, to read a table of ranges; its schemas are dictionaries."""
        made = {"type": "no-info", "function": cls}
        written = {"type": "function-plain", "function": dict}
        return {"type": "function-after", "schema": handler(dict[str, DimRange]), "function": made, "serialization": written}


def hull(profiles: tuple[Dims, ...]) -> Dims:
    """Return the smallest and largest size of each dimension over all profiles; optimal ones are the first profile's."""

    def over(name: str) -> DimRange:
        ranges = [profile[name] for profile in profiles]
        return DimRange(min(r.min for r in ranges), ranges[0].opt, max(r.max for r in ranges))

    return Dims({name: over(name) for name in profiles[0]})


@dataclass(frozen=True)
class Tensor:
    """One input or output.

    Attributes:
        name: in the graph; look tensors up by it, never by position.
        dtype: element type. That of a floating-point tensor is what PyTorch takes; a half-precision model may have others,
            see :meth:`Signature.of_floats`.
        axes: a number is a fixed size, a string one of the named dimensions, or of an output what follows from them, such as
            ``height * width``.
        fill: of an input that may be left out, the value that stands everywhere in it then; none where it must be given.

    Raises:
        InputError: a fixed size below 1, or of more than 64 bits.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    name: str
    dtype: DType
    axes: tuple[Axis, ...]
    fill: bool | int | float | None = None

    def __post_init__(self) -> None:
        if wrong := [axis for axis in self.axes if isinstance(axis, int) and not 1 <= axis < LIMIT]:
            raise InputError(f"tensor {self.name} has an axis of {wrong[0]}; a fixed size is at least 1, in 64 bits")

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return its shape where each named dimension has its size."""
        return tuple(
            [axis if isinstance(axis, int) else sizes[axis] if axis in sizes else value_of(axis, sizes) for axis in self.axes]
        )

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers."""
        return "float" in self.dtype


def _check_length(name: str) -> None:
    size = len(name.encode(errors="surrogatepass"))
    if size > _LONGEST_NAME:
        raise InputError(f"signature: the name {name[:40]}... has {size} bytes; at most {_LONGEST_NAME}")


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives.

    Attributes:
        inputs: in the order of the graph's.
        outputs: likewise.
        dims: every named dimension, and its range.
        batch: the dimension along which entries are apart: none changes what comes out for another. None where there is none.
        masks: for each dimension that may be padded, the bool or integer input over ``(batch, dimension)`` that is false, or 0,
            at padding.

    Raises:
        InputError: two tensors of one name, a name of over 255 bytes, a dimension that no input which must be given has, or
            a mask that is none.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    dims: Dims
    batch: str | None = None
    masks: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in (*self.inputs, *self.outputs)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"signature: {twice[0]} is the name of two tensors; give each its own")
        for name in (*names, *self.dims):
            _check_length(name)
        known = {axis for tensor in self.inputs if tensor.fill is None for axis in tensor.axes if isinstance(axis, str)}
        used = {axis for tensor in self.inputs for axis in tensor.axes if isinstance(axis, str)}
        used |= {name for tensor in self.outputs for axis in tensor.axes for name in self.dims_of(axis)}
        for name in sorted({*used, *self.dims, *([] if self.batch is None else [self.batch])}):
            if name not in known or name not in self.dims:
                raise InputError(f"signature: dimension {name} needs a range, and an input that has it and must be given")
        for dim, name in self.masks.items():
            self._check_mask(dim, name)

    def _check_mask(self, dim: str, name: str) -> None:
        axes = (self.batch, dim) if self.batch else (dim,)
        if dim == self.batch or not any((t.name, t.axes, t.is_float) == (name, axes, False) for t in self.inputs):
            raise InputError(f"signature: {name} cannot mask {dim}; a mask is a bool or integer input over {list(axes)}")

    def dims_of(self, axis: Axis) -> frozenset[str]:
        """Return the dimensions that an axis depends on."""
        if isinstance(axis, int):
            return frozenset()
        return frozenset([axis]) if axis in self.dims else names_in(axis)

    @cached_property
    def lengths(self) -> tuple[str, ...]:
        """Every dimension but the batch."""
        return tuple(name for name in self.dims if name != self.batch)

    @cached_property
    def _places(self) -> tuple[tuple[str, str, int], ...]:
        """For each dimension an input that has it, and the axis there."""
        given = [(t.name, index, axis) for t in self.inputs if t.fill is None for index, axis in enumerate(t.axes)]
        found = {axis: (name, index) for name, index, axis in reversed(given) if isinstance(axis, str)}
        return tuple((dim, *found[dim]) for dim in self.dims)

    @cached_property
    def masks_all(self) -> bool:
        """Whether a mask tells of the padding in every length."""
        return set(self.masks) == set(self.lengths)

    def sizes(self, arrays: Mapping[str, Any]) -> dict[str, int]:
        """Return the size of each dimension, read from the inputs of a checked call."""
        return {dim: arrays[name].shape[axis] for dim, name, axis in self._places}

    def counts(self, arrays: Mapping[str, Any]) -> tuple[int, int]:
        """Return the entries and the rows of a checked call, straight from its arrays: this is done for each call."""
        entries, length = 1, 0
        for dim, name, axis in self._places:
            size = arrays[name].shape[axis]
            if dim == self.batch:
                entries = size
            else:
                length += size
        return entries, entries * length

    def entries(self, sizes: Mapping[str, int]) -> int:
        """Return how many entries a call of these sizes has: its batch, or one."""
        return sizes[self.batch] if self.batch else 1

    def rows(self, sizes: Mapping[str, int]) -> int:
        """Return how many positions of all lengths a call of these sizes has."""
        return self.entries(sizes) * sum([sizes[name] for name in self.lengths])

    @cached_property
    def not_stackable(self) -> Tensor | None:
        """The first tensor that keeps requests apart: its batch does not come first, or it has two lengths."""
        for tensor in (*self.inputs, *self.outputs):
            lengths = [name for axis in tensor.axes for name in self.dims_of(axis) if name in self.lengths]
            if (
                self.batch is None
                or tensor.axes[:1] != (self.batch,)
                or len(lengths) > 1
                or any(self.batch in self.dims_of(axis) for axis in tensor.axes[1:])
            ):
                return tensor
        return None

    @cached_property
    def pads(self) -> bool:
        """Whether requests of different lengths can be one batch: each can be stacked, and a mask tells of all padding."""
        return self.not_stackable is None and self.masks_all

    def of_floats(self, dtype: DType) -> "Signature":
        """Return the same with this element type in place of float32."""

        def changed(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(replace(t, dtype=dtype) if t.dtype == "float32" else t for t in tensors)

        return replace(self, inputs=changed(self.inputs), outputs=changed(self.outputs))

    def within(self, dims: Dims) -> "Signature":
        """Return the same with other ranges."""
        return replace(self, dims=dims)
