"""Optimization profiles: from ranges of the named dimensions to shapes of the tensors, and the profile for given shapes."""

import math
from collections.abc import Iterable, Mapping, Sequence

from bca_deploy.errors import InputError, nearest
from bca_deploy.signature import DimRange, Dims, Tensor

#: The smallest, the optimal and the largest shape of one tensor.
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
#: Those of each input: one profile.
Ranges = Mapping[str, Shapes]


def resolve(tables: Iterable[Mapping[str, DimRange]], dims: Dims) -> tuple[Dims, ...]:
    """Return each profile with every dimension filled in; one profile over all of ``dims`` where there is no table.

    Raises:
        InputError: a dimension that there is not, a range outside ``dims``, or two profiles that are the same.
    """
    profiles = tuple(_one(number, table, dims) for number, table in enumerate(tables, 1)) or (dims,)
    if len(set(profiles)) < len(profiles):
        raise InputError("two optimization profiles are the same; leave one of them out")
    return profiles


def _one(number: int, table: Mapping[str, DimRange], dims: Dims) -> Dims:
    for name, asked in table.items():
        if name not in dims:
            raise InputError(f"profile {number}: {name!r} is no dimension{nearest(name, dims)}; there are {', '.join(dims)}")
        allowed = dims[name]
        if asked.min < allowed.min or asked.max > allowed.max:
            raise InputError(
                f"profile {number}: {name} {asked.min} to {asked.max} is outside the bundle's {allowed.min} to {allowed.max}; "
                f"narrow the profile, or export again with --{name.replace('_', '-')} {asked.min}:{asked.opt}:{asked.max}"
            )
    return Dims({name: table.get(name, dims[name]) for name in dims})


def shapes(profile: Dims, tensors: Iterable[Tensor]) -> dict[str, Shapes]:
    """Return the smallest, optimal and largest shape of each tensor; one name is one size in all of them."""
    low, opt, high = profile.at("min"), profile.at("opt"), profile.at("max")
    return {tensor.name: (tensor.shape(low), tensor.shape(opt), tensor.shape(high)) for tensor in tensors}


def is_static(profiles: tuple[Dims, ...]) -> bool:
    """Whether the one profile fixes every dimension, so that the engine needs none."""
    return len(profiles) == 1 and all(r.min == r.max for r in profiles[0].values())


def choose_profile(profiles: Sequence[Ranges], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of the profile that holds the shapes and whose optimal ones are nearest to them, as ratios.

    Args:
        profiles: the engine's.
        shapes: of the inputs at hand.

    Raises:
        InputError: no profile holds them.
    """
    fitting = [index for index, ranges in enumerate(profiles) if _holds(ranges, shapes)]
    if not fitting:
        allowed = "; ".join(_in_words(ranges) for ranges in profiles)
        raise InputError(f"no profile of the engine holds {_sizes(shapes)}; it has: {allowed}")
    return min(fitting, key=lambda index: _distance(profiles[index], shapes))


def _holds(ranges: Ranges, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return all(
        len(shape) == len(ranges[name][0])
        and all(low <= size <= high for low, size, high in zip(ranges[name][0], shape, ranges[name][2], strict=True))
        for name, shape in shapes.items()
    )


def _distance(ranges: Ranges, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Sum of the ratios' logarithms: half as long is as far off as twice as long, in every dimension alike."""
    pairs = [pair for name, shape in shapes.items() for pair in zip(shape, ranges[name][1], strict=True)]
    return math.fsum(abs(math.log(size / opt)) for size, opt in pairs)


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def _in_words(ranges: Ranges) -> str:
    return ", ".join(f"{name} {list(low)} to {list(high)}" for name, (low, _, high) in ranges.items())
