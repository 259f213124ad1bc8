"""Which axes of the inputs are dynamic, what each is called, and the sizes it may have: declared, or read from two samples."""

import keyword
from collections.abc import Mapping, Sequence

from bca_deploy.errors import InputError, nearest
from bca_deploy.signature import Axis, DimRange, Dims
from bca_deploy.whole.samples import Sample

#: Of each input, one for each axis.
Axes = dict[str, tuple[Axis, ...]]
#: The same as a user gives it: None keeps the size of the samples.
GivenAxes = Mapping[str, Sequence[str | int | None]]

# The name of what differs along the first axis of an input.
_BATCH = "batch"
# A dimension without a range may grow to so many times what the samples show.
_GROWTH = 4


def axes_of(samples: Sequence[Sample], given: GivenAxes | None = None) -> Axes:
    """Return the axes of every input: sizes that are fixed, names of those that are not.

    Args:
        samples: of one model, by forward's argument names; where sizes differ between them an axis is dynamic.
        given: what the user says of some inputs; it goes before what the samples show.

    Raises:
        InputError: the samples contradict each other, or what is given; or one sample, and nothing given.
    """
    _check_alike(samples)
    given = dict(given or {})
    _check_given(samples[0], given)
    if len(samples) == 1 and not given:
        raise InputError(
            "one sample does not show which axes are dynamic; give a second one of other sizes, or axes such as "
            '{"x": ("batch", "x_len", None)}'
        )
    groups = _Groups(samples, given)
    found = {name: tuple(groups.axis(name, index) for index in range(t.ndim)) for name, t in samples[0].items()}
    for sample in samples:
        _check_sizes(sample, found)
    return found


def _check_alike(samples: Sequence[Sample]) -> None:
    first = samples[0]
    for number, sample in enumerate(samples[1:], 2):
        if set(sample) != set(first):
            odd = sorted(set(sample) ^ set(first))
            raise InputError(f"sample 1 and sample {number} do not have the same inputs: {', '.join(odd)} is in one of them")
        for name, tensor in sample.items():
            if (tensor.ndim, tensor.dtype) != (first[name].ndim, first[name].dtype):
                raise InputError(
                    f"input {name} has {first[name].ndim} axes of {first[name].dtype} in sample 1, and {tensor.ndim} of "
                    f"{tensor.dtype} in sample {number}; samples differ in sizes alone"
                )
    for number, sample in enumerate(samples, 1):
        for name, tensor in sample.items():
            if 0 in tensor.shape:
                raise InputError(f"input {name} has shape {list(tensor.shape)} in sample {number}; a sample has no empty axis")


def _check_given(sample: Sample, given: GivenAxes) -> None:
    for name, axes in given.items():
        if name not in sample:
            raise InputError(f"axes are given for {name!r}, which no sample has{nearest(name, sample)}")
        if len(axes) != sample[name].ndim:
            raise InputError(f"axes of {name}: {len(axes)} are given, and the samples have {list(sample[name].shape)}")
        for index, axis in enumerate(axes):
            if isinstance(axis, str) and (not axis.isidentifier() or keyword.iskeyword(axis)):
                raise InputError(f"axes of {name}: axis {index} is {axis!r}; a dimension's name is a word, such as x_len")
            if isinstance(axis, int) and axis != sample[name].shape[index]:
                raise InputError(
                    f"axes of {name}: axis {index} is to be {axis}, and is {sample[name].shape[index]} in sample 1"
                )


class _Groups:
    """The axes that have the same sizes in every sample, and their names."""

    def __init__(self, samples: Sequence[Sample], given: GivenAxes) -> None:
        self._samples, self._given = samples, given
        self._names: dict[tuple[int, ...], str] = {}
        for name, axes in given.items():
            for index, axis in enumerate(axes):
                if isinstance(axis, str):
                    self._names.setdefault(self._sizes(name, index), axis)

    def axis(self, name: str, index: int) -> Axis:
        sizes = self._sizes(name, index)
        if name in self._given:
            axis = self._given[name][index]
            return axis if isinstance(axis, str) else sizes[0]
        if len(self._samples) == 1 or len(set(sizes)) == 1:
            return sizes[0]
        return self._names.setdefault(sizes, self._new_name(name, index))

    def _new_name(self, name: str, index: int) -> str:
        wanted = _BATCH if index == 0 else f"{name}_len" if self._dynamic(name) == [index] else f"{name}_{index}"
        taken = set(self._names.values())
        return wanted if wanted not in taken else f"{name}_{index}"

    def _dynamic(self, name: str) -> list[int]:
        """Return the input's axes that differ between samples, the first axis aside."""
        axes = range(1, self._samples[0][name].ndim)
        return [index for index in axes if len(set(self._sizes(name, index))) > 1]

    def _sizes(self, name: str, index: int) -> tuple[int, ...]:
        return tuple(sample[name].shape[index] for sample in self._samples)


def _check_sizes(sample: Sample, axes: Axes) -> None:
    known: dict[str, tuple[int, str]] = {}
    for name, tensor in sample.items():
        for index, (axis, size) in enumerate(zip(axes[name], tensor.shape, strict=True)):
            if isinstance(axis, int):
                if axis != size:
                    raise InputError(
                        f"input {name}: axis {index} is fixed and is {axis} in one sample, {size} in another; name it in axes"
                    )
            elif known.setdefault(axis, (size, name))[0] != size:
                other = known[axis]
                raise InputError(
                    f"input {name}: axis {index} ({axis}) is {size}, but {other[1]} has {other[0]} in the same sample; "
                    "they must agree, or have names of their own"
                )


def sizes_of(sample: Sample, axes: Axes) -> dict[str, int]:
    """Return the size of each named dimension in a sample."""
    return {a: n for name, t in sample.items() for a, n in zip(axes[name], t.shape, strict=True) if isinstance(a, str)}


def ranges_of(samples: Sequence[Sample], axes: Axes, given: Mapping[str, DimRange]) -> tuple[Dims, tuple[str, ...]]:
    """Return the range of every named dimension, in the order of the inputs, and which of them nobody gave.

    A dimension without a range has 1, the largest sample's size, and four times that.

    Raises:
        InputError: a range of a dimension that there is not, or one that a sample leaves.
    """
    sizes = [sizes_of(sample, axes) for sample in samples]
    names = list(dict.fromkeys(axis for name in samples[0] for axis in axes[name] if isinstance(axis, str)))
    for name, allowed in given.items():
        if name not in names:
            raise InputError(f"there is no dimension {name!r}{nearest(name, names)}; there are {', '.join(names) or 'none'}")
        for number, found in enumerate(sizes, 1):
            if not allowed.min <= found[name] <= allowed.max:
                raise InputError(f"{name} is {found[name]} in sample {number}, and is to be {allowed.min} to {allowed.max}")
    largest = {name: max(found[name] for found in sizes) for name in names}
    made = {name: DimRange(1, largest[name], _GROWTH * largest[name]) for name in names if name not in given}
    return Dims({name: given[name] if name in given else made[name] for name in names}), tuple(made)
