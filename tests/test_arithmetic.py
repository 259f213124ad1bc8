"""Expressions of sizes: what Python makes of them, within the table that the C++ runtime is held to, too."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bca_deploy.arithmetic import names_in, value_of
from bca_deploy.errors import InputError

TABLE = json.loads((Path(__file__).parent / "arithmetic_cases.json").read_text(encoding="utf-8"))
SIZES: dict[str, int] = TABLE["sizes"]
NO_SIZE = "give a number, a dimension, or an expression of them with + - * // %, min, max and parentheses, of at most 400 bytes"

NAMED = {"a": 5, "b": 3, "rows": 64}
leaves = st.one_of(st.integers(0, 99).map(str), st.sampled_from(sorted(NAMED)))


def larger(smaller: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Expressions with and without parentheses and spaces, so that how tightly each operator binds is seen."""
    pairs = st.tuples(smaller, st.sampled_from(["+", " - ", "*", " // ", "%", " * -"]), smaller).map("".join)
    calls = st.tuples(st.sampled_from(["min", "max"]), st.lists(smaller, min_size=2, max_size=3)).map(
        lambda call: f"{call[0]}({', '.join(call[1])})"
    )
    return st.one_of(pairs, pairs.map("({})".format), smaller.map("-{}".format), calls)


expressions = st.recursive(leaves, larger, max_leaves=12).filter(lambda text: len(text) <= 400)


@given(expressions)
def test_an_expression_is_what_python_makes_of_it(expression: str) -> None:
    try:
        wanted = eval(expression, {"min": min, "max": max}, dict(NAMED))  # noqa: S307  (made above)
    except ZeroDivisionError:
        with pytest.raises(InputError, match=" divides by 0 at "):
            value_of(expression, NAMED)
        return
    if wanted < 0:
        with pytest.raises(InputError, match=f" is {wanted}, below 0, at "):
            value_of(expression, NAMED)
        return
    assert value_of(expression, NAMED) == wanted
    assert names_in(expression) <= NAMED.keys()


@pytest.mark.parametrize(("expression", "value"), TABLE["values"], ids=range(len(TABLE["values"])))
def test_an_expression_is_what_the_table_says(expression: str, value: int) -> None:
    assert value_of(expression, SIZES) == value


@pytest.mark.parametrize("expression", TABLE["no_size"], ids=range(len(TABLE["no_size"])))
def test_what_is_no_expression_is_refused(expression: str) -> None:
    for refused in (names_in, lambda text: value_of(text, SIZES)):
        with pytest.raises(InputError) as error:
            refused(expression)
        assert str(error.value) == f"{expression!r} is no size: {NO_SIZE}"


@pytest.mark.parametrize(("expression", "fault"), TABLE["no_value"])
def test_an_expression_without_a_value_says_why_and_at_which_sizes(expression: str, fault: str) -> None:
    with pytest.raises(InputError) as error:
        value_of(expression, SIZES)
    assert str(error.value) == f"{expression!r} {fault}; give other sizes"


def test_the_table_has_nothing_twice() -> None:
    for kind in ("values", "no_size", "no_value"):
        entries = [json.dumps(entry) for entry in TABLE[kind]]
        assert len(entries) == len(set(entries)) > 10, kind


def test_the_names_are_those_of_dimensions_and_not_of_functions() -> None:
    assert names_in("min(a, 2 * b) // (a - max)") == {"a", "b", "max"}
    assert names_in("12") == frozenset()


def test_a_size_that_is_not_there_is_the_callers_mistake() -> None:
    with pytest.raises(KeyError, match="b"):
        value_of("a * b", {"a": 1})


@pytest.mark.parametrize(("opening", "closing"), [("(", ")"), ("-", ""), ("min(1, ", ")"), ("1+", "")])
@pytest.mark.parametrize("depth", [10_000, 1_000_000])
def test_a_huge_nesting_is_refused_at_once(opening: str, closing: str, depth: int) -> None:
    with pytest.raises(InputError, match=" is no size: "):
        names_in(opening * depth + "1" + closing * depth)


@given(st.text(alphabet="ab1 +-*/%(),.min", max_size=18))
def test_any_text_is_read_as_python_reads_it_or_refused(text: str) -> None:
    try:
        names = names_in(text)
    except InputError:
        return
    sizes = dict.fromkeys(names, 7)
    assert _outcome(lambda: value_of(text, sizes)) == _outcome(lambda: eval(text.strip(), {"min": min, "max": max}, sizes))  # noqa: S307


def _outcome(call: Any) -> int | str:
    try:
        found: int = call()
    except (ZeroDivisionError, InputError):
        return "none"
    return found if found >= 0 else "none"


def test_many_names_are_told_apart_from_anything_else_in_no_time() -> None:
    """A pattern that looks for a way to split a name would not end."""
    letters = "".join(random.Random(0).choices("abc_1", k=380))  # noqa: S311
    with pytest.raises(InputError, match="is no size"):
        names_in(f"a{letters}!")
