"""Optimization profiles: from ranges of the named dimensions to shapes of the tensors, and the profile for given shapes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

from bca_deploy.bundle.engine_options import ProfileTable
from bca_deploy.bundle.manifest import TensorEntry
from bca_deploy.errors import InputError
from bca_deploy.spec import DimRange, Dims

#: The smallest, the optimal and the largest shape of one tensor.
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
#: Those of each input: one profile.
Ranges = Mapping[str, Shapes]


def resolve(tables: Iterable[ProfileTable], dims: Dims) -> tuple[Dims, ...]:
    """Return each profile with every dimension filled in; one profile over all of ``dims`` where there is no table.

    Raises:
        InputError: a range goes outside ``dims``, or two profiles are the same.
    """
    profiles = tuple(_one(number, table, dims) for number, table in enumerate(tables, 1)) or (dims,)
    if len(set(profiles)) < len(profiles):
        raise InputError("two optimization profiles are the same; leave one of them out")
    return profiles


def _one(number: int, table: ProfileTable, dims: Dims) -> Dims:
    ranges = {axis.name: getattr(table, axis.name) or getattr(dims, axis.name) for axis in fields(Dims)}
    for name, asked in ranges.items():
        allowed = getattr(dims, name)
        if asked.min < allowed.min or asked.max > allowed.max:
            raise InputError(
                f"profile {number}: {name} {asked.min} to {asked.max} is outside the bundle's {allowed.min} to {allowed.max}; "
                f"narrow the profile, or export again with --{name.replace('_', '-')} {asked.min}:{asked.opt}:{asked.max}"
            )
    return Dims(**ranges)


def shapes(profile: Dims, tensors: Iterable[TensorEntry]) -> dict[str, Shapes]:
    """Return the smallest, optimal and largest shape of each tensor; one name is one size in all of them."""
    return {
        tensor.name: (
            tuple(axis if isinstance(axis, int) else getattr(profile, axis).min for axis in tensor.axes),
            tuple(axis if isinstance(axis, int) else getattr(profile, axis).opt for axis in tensor.axes),
            tuple(axis if isinstance(axis, int) else getattr(profile, axis).max for axis in tensor.axes),
        )
        for tensor in tensors
    }


def is_static(profiles: tuple[Dims, ...]) -> bool:
    """Whether the one profile fixes every dimension, so that the engine needs none."""
    ranges = [getattr(profile, axis.name) for profile in profiles for axis in fields(Dims)]
    return len(profiles) == 1 and all(r.min == r.max for r in ranges)


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


def hull(profiles: tuple[Dims, ...]) -> Dims:
    """Return the smallest and largest size of each dimension over all profiles; optimal ones are the first profile's."""

    def over(name: str) -> DimRange:
        ranges = [getattr(profile, name) for profile in profiles]
        return DimRange(min(r.min for r in ranges), ranges[0].opt, max(r.max for r in ranges))

    return Dims(over("batch"), over("x_len"), over("context_len"))
