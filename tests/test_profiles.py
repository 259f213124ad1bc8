"""Optimization profiles: whatever leaves this module fits inside the bundle's dims, and a builder can take it as it is."""

import re
from dataclasses import fields

import pytest
from conftest import make_spec
from hypothesis import given
from hypothesis import strategies as st

from bca_deploy.cli import _range
from bca_deploy.errors import InputError
from bca_deploy.manifest import TensorEntry
from bca_deploy.profiles import is_static, resolve, shapes
from bca_deploy.recipe import ProfileTable
from bca_deploy.spec import DimRange, Dims, Interface

DIMS = Dims(batch=DimRange(1, 4, 8), x_len=DimRange(2, 512, 2048), context_len=DimRange(1, 300, 1024))
NAMES = tuple(axis.name for axis in fields(Dims))


def tensors() -> tuple[TensorEntry, ...]:
    spec, interface = make_spec(), Interface(rel_pos_bias="shared")
    axes = interface.inputs(spec) | interface.outputs(spec)
    return tuple(TensorEntry(name=name, dtype="float32", axes=axes[name]) for name in axes)


@st.composite
def inside(draw: st.DrawFn) -> ProfileTable:
    """A profile inside DIMS; a dimension may be left out."""
    ranges = {}
    for name in draw(st.sets(st.sampled_from(NAMES))):
        allowed = getattr(DIMS, name)
        sizes = st.integers(allowed.min, allowed.max)
        ranges[name] = DimRange(*sorted(draw(st.tuples(sizes, sizes, sizes))))
    return ProfileTable(**ranges)


@given(inside())
def test_a_profile_inside_the_dims_is_kept_and_filled_up_with_them(table: ProfileTable) -> None:
    (profile,) = resolve((table,), DIMS)
    for name in NAMES:
        assert getattr(profile, name) == (getattr(table, name) or getattr(DIMS, name))


@given(inside())
def test_the_shapes_of_a_profile_are_ordered_and_one_name_is_one_size(table: ProfileTable) -> None:
    (profile,) = resolve((table,), DIMS)
    entries = tensors()
    found = shapes(profile, entries)
    assert list(found) == [entry.name for entry in entries]
    for entry in entries:
        for axis, *sizes in zip(entry.axes, *found[entry.name], strict=True):
            wanted = [axis] * 3 if isinstance(axis, int) else list(vars(getattr(profile, axis)).values())
            assert sizes == wanted
            assert sizes == sorted(sizes)


def test_without_a_table_there_is_one_profile_over_all_dims() -> None:
    assert resolve((), DIMS) == (DIMS,)


def test_several_profiles_keep_their_order() -> None:
    tables = [ProfileTable(batch=DimRange(size, size, size)) for size in (8, 1, 4)]
    assert [profile.batch.opt for profile in resolve(tables, DIMS)] == [8, 1, 4]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("batch", DimRange(1, 1, 9)),
        ("x_len", DimRange(1, 64, 2048)),
        ("context_len", DimRange(1025, 1025, 1025)),
    ],
)
def test_a_range_outside_the_dims_is_refused_with_both_and_both_ways_out(name: str, asked: DimRange) -> None:
    allowed, flag = getattr(DIMS, name), name.replace("_", "-")
    message = (
        f"profile 2: {name} {asked.min} to {asked.max} is outside the bundle's {allowed.min} to {allowed.max}; "
        f"narrow the profile, or export again with --{flag} {asked.min}:{asked.opt}:{asked.max}"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        resolve((ProfileTable(), ProfileTable(**{name: asked})), DIMS)
    assert DimRange(**(_range(message.rpartition(" ")[2]) or {})) == asked  # the flag is one that the command line reads


@pytest.mark.parametrize("again", [ProfileTable(), ProfileTable(**vars(DIMS))])
def test_the_same_profile_twice_is_refused_however_it_is_written(again: ProfileTable) -> None:
    with pytest.raises(InputError, match="two optimization profiles are the same; leave one of them out"):
        resolve((ProfileTable(), ProfileTable(batch=DimRange(1, 1, 1)), again), DIMS)


def test_only_one_profile_that_fixes_everything_is_static() -> None:
    one, two = (Dims(*[DimRange(size, size, size)] * 3) for size in (1, 2))
    assert is_static((one,))
    assert not is_static((one, two))  # there is a profile to choose
    for name in NAMES:
        assert not is_static((Dims(**{**vars(one), name: DimRange(1, 1, 2)}),))
