"""Optimization profiles: whatever leaves this module fits inside the bundle's dims, and a builder can take it as it is."""

import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.layers import make_spec

from bca_deploy.cli.common import read_range
from bca_deploy.engines.profiles import Ranges, choose_profile, is_static, resolve, shapes
from bca_deploy.errors import InputError
from bca_deploy.signature import DimRange, Dims, Tensor
from bca_deploy.spec import Interface, layer_signature

DIMS = Dims(batch=DimRange(1, 4, 8), x_len=DimRange(2, 512, 2048), context_len=DimRange(1, 300, 1024))
NAMES = tuple(DIMS)
Table = dict[str, DimRange]


def tensors() -> tuple[Tensor, ...]:
    signature = layer_signature(make_spec(), Interface(rel_pos_bias="shared"))
    return (*signature.inputs, *signature.outputs)


@st.composite
def inside(draw: st.DrawFn) -> Table:
    """A profile inside DIMS; a dimension may be left out."""
    ranges = {}
    for name in draw(st.sets(st.sampled_from(NAMES))):
        allowed = DIMS[name]
        sizes = st.integers(allowed.min, allowed.max)
        ranges[name] = DimRange(*sorted(draw(st.tuples(sizes, sizes, sizes))))
    return ranges


@given(inside())
def test_a_profile_inside_the_dims_is_kept_and_filled_up_with_them(table: Table) -> None:
    (profile,) = resolve((table,), DIMS)
    for name in NAMES:
        assert profile[name] == table.get(name, DIMS[name])


@given(inside())
def test_the_shapes_of_a_profile_are_ordered_and_one_name_is_one_size(table: Table) -> None:
    (profile,) = resolve((table,), DIMS)
    entries = tensors()
    found = shapes(profile, entries)
    assert list(found) == [entry.name for entry in entries]
    for entry in entries:
        for axis, *sizes in zip(entry.axes, *found[entry.name], strict=True):
            wanted = [axis] * 3 if isinstance(axis, int) else list(vars(profile[axis]).values())
            assert sizes == wanted
            assert sizes == sorted(sizes)


def test_without_a_table_there_is_one_profile_over_all_dims() -> None:
    assert resolve((), DIMS) == (DIMS,)


def test_several_profiles_keep_their_order() -> None:
    tables = [{"batch": DimRange(size, size, size)} for size in (8, 1, 4)]
    assert [profile["batch"].opt for profile in resolve(tables, DIMS)] == [8, 1, 4]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("batch", DimRange(1, 1, 9)),
        ("x_len", DimRange(1, 64, 2048)),
        ("context_len", DimRange(1025, 1025, 1025)),
    ],
)
def test_a_range_outside_the_dims_is_refused_with_both_and_both_ways_out(name: str, asked: DimRange) -> None:
    allowed, flag = DIMS[name], name.replace("_", "-")
    message = (
        f"profile 2: {name} {asked.min} to {asked.max} is outside the bundle's {allowed.min} to {allowed.max}; "
        f"narrow the profile, or export again with --{flag} {asked.min}:{asked.opt}:{asked.max}"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        resolve(({}, {name: asked}), DIMS)
    assert DimRange(**(read_range(message.rpartition(" ")[2]) or {})) == asked  # the flag is one that the command line reads


def test_a_dimension_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"profile 1: 'x_length' is no dimension \(did you mean 'x_len'\?\); there are batch, x"
    ):
        resolve(({"x_length": DimRange(1, 1, 1)},), DIMS)


@pytest.mark.parametrize("again", [{}, dict(DIMS)])
def test_the_same_profile_twice_is_refused_however_it_is_written(again: Table) -> None:
    with pytest.raises(InputError, match="two optimization profiles are the same; leave one of them out"):
        resolve(({}, {"batch": DimRange(1, 1, 1)}, again), DIMS)


def test_only_one_profile_that_fixes_everything_is_static() -> None:
    one, two = (Dims(dict.fromkeys(NAMES, DimRange(size, size, size))) for size in (1, 2))
    assert is_static((one,))
    assert not is_static((one, two))  # there is a profile to choose
    for name in NAMES:
        assert not is_static((Dims(one, **{name: DimRange(1, 1, 2)}),))


# ---- the profile for given shapes

SHORT: Ranges = {"x": ((1, 1, 8), (4, 8, 8), (8, 64, 8)), "mask": ((1, 1), (4, 8), (8, 64))}
LONG: Ranges = {"x": ((1, 1, 8), (4, 256, 8), (8, 512, 8)), "mask": ((1, 1), (4, 256), (8, 512))}


def sizes(length: int) -> Mapping[str, tuple[int, ...]]:
    return {"x": (4, length, 8), "mask": (4, length)}


@pytest.mark.parametrize(
    ("length", "profile"),
    [
        (1, 0),
        (8, 0),
        (44, 0),  # 5.5 times 8, and 256 is 5.8 times 44
        (46, 1),
        (64, 1),
        (65, 1),  # too long for the first
        (512, 1),
    ],
)
def test_the_nearest_profile_that_holds_the_shapes_is_chosen(length: int, profile: int) -> None:
    assert choose_profile([SHORT, LONG], sizes(length)) == profile
    assert choose_profile([LONG, SHORT], sizes(length)) == 1 - profile


def test_of_equal_profiles_the_first_is_chosen() -> None:
    assert choose_profile([SHORT, SHORT], sizes(8)) == 0


@pytest.mark.parametrize(
    "shapes", [sizes(513), {"x": (9, 8, 8), "mask": (9, 8)}, {"x": (4, 8, 7), "mask": (4, 8)}, {"x": (4, 8)}]
)
def test_shapes_that_no_profile_holds_are_refused(shapes: Mapping[str, tuple[int, ...]]) -> None:
    said = r"^no profile of the engine holds x \[.*; it has: x \[1, 1, 8\] to \[8, 64, 8\], mask \[1, 1\] to \[8, 64\]; x \["
    with pytest.raises(InputError, match=said):
        choose_profile([SHORT, LONG], shapes)
